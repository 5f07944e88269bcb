"""The record between deciding and executing: `StepPlan` down, `StepResult` back.

A plan carries deltas. A worker keeps what does not change (token history, block table, sampling
parameters), keyed by (sequence, epoch): the full record comes once, in `starts`, and again under a
higher epoch whenever the worker's copy can no longer be right (after a preemption or a loss).

Positions of one sequence, at the moment a plan is made:

    0 ........ start ............ start+count ........ len(history)
    | in KV    | computed by this | not yet            |
    | already  | step             | (later steps)      |

`history` is what the full record gave plus every `SequenceStep.tokens` since. A step samples iff it
reaches the end of the history.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from fabric.core.quick import halves
from fabric.core.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """A token that plan `plan_id` samples in row `row` and that the host does not know yet."""

    plan_id: int
    row: int


class CopyKind(IntEnum):
    """Between which pools a block moves."""

    DEVICE = 0  # device -> device (copy-on-write)
    SWAP_OUT = 1  # device -> host
    SWAP_IN = 2  # host -> device
    EXPORT = 3  # device -> staging, on its way to another replica
    IMPORT = 4  # staging -> device, come from another replica


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """One whole block, all layers. `source` and `target` are block numbers in their own pools; of
    the staging area, slots, which are used once."""

    kind: CopyKind
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStart:
    """The full record of a sequence (one choice of one request) at a worker.

    `tokens`: prompt and what was generated so far; the first `prompt_length` are the prompt.
    `blocks`: its block table before this plan's `SequenceStep.blocks` are appended.
    """

    sequence: int
    epoch: int
    choice: int
    tokens: tuple[int, ...]
    prompt_length: int
    blocks: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """What one sequence computes in this step: history positions [start, start + count).

    `tokens` are appended to the history and `blocks` to the block table first. `samples`: draw the
    next token from the last position's logits. `replace` = (index, block): a table entry that
    copy-on-write changed (at most one a step: only the block written at `start` can be shared).
    """

    sequence: int
    epoch: int
    start: int
    count: int
    samples: bool
    tokens: tuple[int | Previous, ...] = ()
    blocks: tuple[int, ...] = ()
    replace: tuple[int, int] | None = None


blank_step, fill_step = halves(SequenceStep)  # every step makes one for each of its sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class KvExport:
    """The KV of positions [first, end) of a prompt lies in the staging slots [slot, slot + blocks)
    once this plan's copies are done: to be fetched there and handed over.

    `first` is where a block begins; so is `end`, or the prompt ends there. `salt`: the prefix root
    of model version, adapter and tenant; `digest`: the chained hash of all tokens up to `end`.
    `epoch`: which attempt to hand this request over. `last`: the prompt ends there.
    """

    request_id: str
    epoch: int
    first: int
    end: int
    last: bool
    slot: int
    blocks: int
    salt: bytes
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step for every worker. Order of execution: drops, copies (in order), starts, steps.

    `exports` are for whoever drives the workers; these see only the copies."""

    plan_id: int
    steps: tuple[SequenceStep, ...]
    starts: tuple[SequenceStart, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    drops: tuple[int, ...] = ()
    exports: tuple[KvExport, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one step row brought back. `token` is None when the row did not sample, and when the
    model's output for it was not a number.

    `logprobs` is there if the request asked. `prompt_logprobs` covers the prompt tokens at
    positions start+1 .. start+count (those this chunk's logits predict), clipped to the prompt.
    """

    token: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """`samples[i]` belongs to `plan.steps[i]`."""

    plan_id: int
    samples: tuple[Sample, ...]
