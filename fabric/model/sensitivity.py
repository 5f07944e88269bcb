"""What rounding a matrix does to the model's predictions, and which matrices stay wider for it.

A matrix's relative error says little: errors of 3 % in every matrix of a model are a tenth of its
divergence in one and nothing in the next. So each is rounded alone and the divergence of what the
model then predicts is measured on a text: the mean KL(plain || rounded) in nats a token. Small
divergences of independent errors add up (on the demo model those of its kinds of matrices to within
2 %), and a divergence of d costs about 100 * d percent of perplexity: a prediction that is that far
off loses as much on average where the plain one was right about its own doubt.

Shape legend: T tokens, N out, K in, V vocabulary, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from fabric.kernels.device import allocate_pool
from fabric.kernels.linear import linear_reference
from fabric.kernels.program import KvPool, Linear, Program, StepBatch
from fabric.kernels.quantized import QuantizedWeight
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.progress import Progress, silent

PAGE = 16
TEXT_TOKENS = 128  # on which the divergences are measured
AT_ONCE = 8  # matrices: bounds the logits to 8 * 128 * vocabulary * 4 bytes


def divergences(
    program: Program,
    tokens: Sequence[int],
    rounded: Sequence[QuantizedWeight],
    progress: Progress = silent,
) -> list[float]:
    """For each `Linear` of the program, in order, what its `rounded` weight does alone. The program
    is float32: the noise of bfloat16 is as large as what is to be measured."""
    position = count()
    plain_TV = read_windows(TorchExecutor(program), [tokens]).log_softmax(dim=-1)
    found: list[float] = []
    while len(found) < len(rounded):
        chosen = range(len(found), min(len(found) + AT_ONCE, len(rounded)))
        position = count()

        def product(op: Linear, x_TK: Tensor) -> Tensor | None:
            index = next(position)  # noqa: B023 - called before the next turn
            if index not in chosen:  # noqa: B023
                return None
            assert isinstance(op.weight_NK, Tensor)
            y_STN = linear_reference(x_TK, op.weight_NK, op.bias_N)
            first = (index - chosen.start) * len(tokens)  # noqa: B023
            mine = slice(first, first + len(tokens))
            y_STN[mine] = linear_reference(x_TK[mine], rounded[index], op.bias_N)
            return y_STN

        executor = TorchExecutor(program, observe=product)
        logits = read_windows(executor, [tokens] * len(chosen))
        for each_TV in logits.split(len(tokens)):
            other_TV = each_TV.log_softmax(dim=-1)
            found.append(float((plain_TV.exp() * (plain_TV - other_TV)).double().sum(dim=1).mean()))
        progress("measuring what each does", len(found), len(rounded))
    return found


def widen(
    estimates: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """For each matrix which of its candidates it gets: at first the cheapest, number 0; then, while
    all together diverge by more than `budget`, the change that saves most for what it costs.

    `estimates`: of each matrix's candidates; the last one is the plain matrix, 0. `costs`: the
    same, ascending.
    """
    choice = [0] * len(estimates)
    while sum(each[at] for each, at in zip(estimates, choice, strict=True)) > budget:
        _, matrix, better = max(
            ((each[at] - each[to]) / (cost[to] - cost[at]), index, to)
            for index, (each, cost, at) in enumerate(zip(estimates, costs, choice, strict=True))
            for to in range(at + 1, len(each))
        )
        choice[matrix] = better
    return choice


def read_windows(
    executor: TorchExecutor, windows: Sequence[Sequence[int]], *, logit_every: int = 1
) -> Tensor:
    """Logits, float32, of one step that reads all windows, of one length, each from its start."""
    length = len(windows[0])
    used, blocks = length * len(windows), -(-length // PAGE)
    layout = executor.kv_layout(PAGE)
    pool = allocate_pool(len(windows) * blocks, layout.block_bytes(), torch.device("cpu"))
    tables = torch.arange(len(windows) * blocks, dtype=torch.int32).view(len(windows), blocks)
    return executor.run(
        StepBatch(
            token_ids_T=torch.tensor([t for each in windows for t in each], dtype=torch.int32),
            query_starts_S1=torch.arange(0, used + 1, length, dtype=torch.int32),
            first_positions_S=torch.zeros(len(windows), dtype=torch.int32),
            table_rows_S=torch.arange(len(windows), dtype=torch.int32),
            block_tables_XB=tables,
            logit_rows_R=torch.arange(0, used, logit_every, dtype=torch.int32),
        ),
        KvPool(layout=layout, blocks_XB=pool),
    )
