"""Captured decode steps: a decode step is some hundred launches of a few microseconds each, which
the host cannot make as fast as the GPU runs them; a CUDA graph makes them all in one.

A graph is of one shape: steps are filled up to sizes in a list, the context to a power of two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fabric.kernels.cuda.step_inputs import StepInputs, StepPacker, StepShape
from fabric.kernels.program import KvPool, StepBatch

# Few steps between sizes cost padding, many cost memory and capture time.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
GRAPHS_MAX = 128  # beyond, steps are launched op by op

Work = Callable[[], Tensor]
Capture = Callable[[Work], Work]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Captured:
    buffer: Tensor
    replay: Work


class DecodeGraphs:
    """Replays decode steps of one pool. `forward` is what is captured; `capture` turns it into what
    replays it: `capture_cuda_graph`, or where there is no GPU the identity."""

    def __init__(
        self,
        forward: Callable[[StepInputs, KvPool], Tensor],
        packer: StepPacker,
        pool: KvPool,
        *,
        capture: Capture,
        longest_min: int,
    ) -> None:
        self._forward = forward
        self._packer = packer
        self._pool = pool
        self._capture = capture
        self._longest_min = longest_min
        self._captured: dict[tuple[int, int], _Captured] = {}

    @property
    def pool(self) -> KvPool:
        """Graphs know its addresses."""
        return self._pool

    def run(self, batch: StepBatch) -> Tensor | None:
        """Logits [R, V], overwritten by the next call; None for a step that is none of decoding
        sequences only, each with logits, or that is too large."""
        sequences = len(batch.first_positions_S)
        if len(batch.token_ids_T) != sequences or len(batch.logit_rows_R) != sequences:
            return None
        if not 0 < sequences <= SIZES[-1]:
            return None
        size = SIZES[bisect_left(SIZES, sequences)]
        reached = int(batch.first_positions_S.max()) + 1
        longest = max(1 << (reached - 1).bit_length(), self._longest_min)
        known = self._captured.get((size, longest))
        if known is None and len(self._captured) >= GRAPHS_MAX:
            return None
        packed = self._packer.pack_padded(batch, sequences=size, longest=longest)
        if known is None:
            known = self._make(size, longest, packed)
        else:
            known.buffer.copy_(packed, non_blocking=True)
        return known.replay()[:sequences]

    def _make(self, size: int, longest: int, packed: Tensor) -> _Captured:
        blocks = -(-longest // self._pool.layout.page)
        shape = StepShape(
            tokens=size,
            logit_rows=size,
            decoding=size,
            chunks=0,
            tiles=0,
            longest=longest,
            blocks=blocks,
        )
        buffer = packed.to(self._pool.blocks_XB.device, copy=True)
        inputs = StepInputs.of(buffer, shape)
        made = _Captured(
            buffer=buffer, replay=self._capture(lambda: self._forward(inputs, self._pool))
        )
        self._captured[size, longest] = made
        return made


def capture_cuda_graph(work: Work) -> Work:
    """Run `work` once on a stream of its own, so that kernels are compiled and libraries ready;
    then capture it. Running it before a replay is harmless: it writes the keys of the same step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
