"""`Share`: what one worker of a group holds of a decoder.

Dense parts are tensor parallel over all tp x ep workers of a pipeline stage: attention by KV heads,
an MLP by its columns, embedding and head by the vocabulary (Megatron-LM, Shoeybi et al. 2019), each
as evenly as it goes. Experts are spread over the ep ranks, an expert's columns over the tp ranks.
Layers are spread over the stages.

    9 heads, 3 KV heads over 2 workers     KV heads 0, 1 and heads 0 to 5 | KV head 2, heads 6 to 8
    2 KV heads over 4 workers              KV heads 0 | 0 | 1 | 1, each group's heads shared out

Row-parallel products are added in chunks (`ChunkedSum`): one KV head's group of the output
projection, a twelfth of an MLP. A worker holds whole chunks, so that 1, 2, 3 or 4 workers give the
same bits. Where heads are replicated, or a group's width is no multiple of 32 (the step in which
the C++ path reads inputs), a worker's part is one chunk, and another number of workers rounds
differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fabric.core.errors import ModelError
from fabric.core.shard import Place, ShardSpec, split_evenly
from fabric.kernels.summation import ChunkedSum
from fabric.model.config import DecoderConfig

INPUT_STEP = 32  # chunks begin at multiples of it
MLP_CHUNKS = 12  # 1, 2, 3, 4, 6 and 12 workers get equal parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """All ranges count in the whole model. `rank` is that among the stage's workers.

    `vocab_runs`: the rows of the vocabulary of each of them; none for a worker that is alone in
    its stage. `expert_runs`: the experts of each ep rank.
    """

    layers: range
    rank: int
    heads: range
    kv_heads: range
    attention: ChunkedSum
    mlp: ChunkedSum
    vocab_runs: tuple[range, ...]
    expert_runs: tuple[range, ...]
    ep_rank: int
    expert_columns: range
    is_first_stage: bool
    is_last_stage: bool

    @property
    def mlp_columns(self) -> range:
        """The columns of an ordinary MLP."""
        return self.mlp.inputs(self.rank)

    @property
    def experts(self) -> range:
        """The experts of a mixture."""
        return self.expert_runs[self.ep_rank]

    def describe(self) -> str:
        """For the log: "layers 0 to 14, heads 0 to 5, ..."."""
        parts = [f"layers {_span(self.layers)}", f"heads {_span(self.heads)}"]
        parts += [f"KV heads {_span(self.kv_heads)}", f"MLP columns {_span(self.mlp_columns)}"]
        if self.expert_runs[-1].stop:
            parts.append(f"experts {_span(self.experts)} (columns {_span(self.expert_columns)})")
        if self.vocab_runs:
            parts.append(f"vocabulary {_span(self.vocab_runs[self.rank])}")
        return ", ".join(parts)


def share_of(config: DecoderConfig, place: Place | None = None) -> Share:
    """What the worker at `place` holds (None: the whole model). Raises `ModelError` if the model
    can't be spread that far."""
    place = place or Place(spec=ShardSpec())
    spec = place.spec
    size = spec.tp * spec.ep
    experts = config.mixture.experts if config.mixture else 0
    if spec.ep > max(experts, 1):
        raise ModelError(f"{experts} experts can't be spread over ep={spec.ep}")
    if spec.pp > config.layers:
        raise ModelError(f"{config.layers} layers can't be spread over pp={spec.pp}")
    rank = place.ep_rank * spec.tp + place.tp_rank
    kv_heads, heads, attention = _attention(config, size, rank)
    columns = config.mixture.intermediate if config.mixture else config.intermediate
    return Share(
        layers=_stages(config, spec.pp)[place.pp_rank],
        rank=rank,
        heads=heads,
        kv_heads=kv_heads,
        attention=attention,
        mlp=_mlp(config.intermediate, size),
        vocab_runs=_steps(config.vocab, size, "tokens") if size > 1 else (),
        expert_runs=split_evenly(experts, spec.ep),
        ep_rank=place.ep_rank,
        expert_columns=_steps(columns, spec.tp, "columns of an expert")[place.tp_rank],
        is_first_stage=place.is_first_stage,
        is_last_stage=place.is_last_stage,
    )


def _attention(config: DecoderConfig, size: int, rank: int) -> tuple[range, range, ChunkedSum]:
    """(KV heads, heads) of a rank, and the order in which the output projection is added."""
    kv_heads, group = config.kv_heads, config.heads // config.kv_heads
    if size > config.heads:
        raise ModelError(f"{config.heads} heads can't be spread over {size} workers")
    if size <= kv_heads:
        runs = split_evenly(kv_heads, size)
        per_rank = [range(run.start * group, run.stop * group) for run in runs]
    else:
        workers = split_evenly(size, kv_heads)
        runs = tuple(range(kv, kv + 1) for kv in range(kv_heads) for _ in workers[kv])
        if max(len(each) for each in workers) > group:
            raise ModelError(
                f"{config.heads} heads in {kv_heads} groups can't be spread over {size} workers"
            )
        per_rank = [
            range(kv * group + part.start, kv * group + part.stop)
            for kv in range(kv_heads)
            for part in split_evenly(group, len(workers[kv]))
        ]
    if size <= kv_heads and group * config.head_dim % INPUT_STEP == 0:
        chunked = ChunkedSum(sizes=(group * config.head_dim,) * kv_heads, runs=runs)
    else:
        chunked = ChunkedSum(
            sizes=tuple(len(heads) * config.head_dim for heads in per_rank),
            runs=tuple(range(each, each + 1) for each in range(size)),
        )
    return runs[rank], per_rank[rank], chunked


def _mlp(columns: int, size: int) -> ChunkedSum:
    steps = -(-columns // INPUT_STEP)
    chunks = min(MLP_CHUNKS, steps)
    if size > chunks:  # no longer the same bits as fewer workers give
        chunks = size
    parts = _steps(columns, chunks, "columns of the MLP")
    return ChunkedSum(sizes=tuple(len(part) for part in parts), runs=split_evenly(chunks, size))


def _steps(total: int, parts: int, what: str) -> tuple[range, ...]:
    """range(total) in `parts`, cut at multiples of `INPUT_STEP` if there are enough of them."""
    if parts > total:
        raise ModelError(f"{total} {what} can't be spread over {parts} workers")
    step = INPUT_STEP if total >= parts * INPUT_STEP else 1
    runs = split_evenly(-(-total // step), parts)
    return tuple(range(run.start * step, min(run.stop * step, total)) for run in runs)


def _stages(config: DecoderConfig, stages: int) -> tuple[range, ...]:
    """The layers of each stage, so that the stage with the most to read (parameters that a token
    uses; the head counts for the last) has as little as can be."""
    hidden, kv = config.hidden, 2 * config.kv_heads
    attention = hidden * config.head_dim * (2 * config.heads + kv)
    costs = [attention + 3 * hidden * _columns(config, layer) for layer in range(config.layers)]
    head = hidden * config.vocab
    low, high = 0, sum(costs) + head
    while low < high:  # the smallest limit that every stage can keep
        limit = (low + high) // 2
        if _cut(costs, head, stages, limit) is None:
            low = limit + 1
        else:
            high = limit
    ends = _cut(costs, head, stages, low)
    assert ends is not None
    return tuple(range(first, last) for first, last in pairwise((0, *ends)))


def _cut(costs: list[int], head: int, stages: int, limit: int) -> list[int] | None:
    """Where stages end if each takes layers up to `limit`; None if they don't get by with it."""
    ends: list[int] = []
    layer = 0
    for stage in range(stages):
        room = limit - (head if stage == stages - 1 else 0)
        taken, behind = 0, stages - 1 - stage
        while layer < len(costs) - behind and taken + costs[layer] <= room:
            taken += costs[layer]
            layer += 1
        if layer == (ends[-1] if ends else 0):
            return None
        ends.append(layer)
    return ends if layer == len(costs) else None


def _columns(config: DecoderConfig, layer: int) -> int:
    mixture = config.mixture
    if mixture is None or not mixture.layers[layer]:
        return config.intermediate
    return mixture.intermediate * mixture.chosen


def _span(run: range) -> str:
    if not run:
        return "none"
    return f"{run.start}" if len(run) == 1 else f"{run.start} to {run.stop - 1}"
