"""What is done without while the SLO is in danger: decided by `core.control.degrade`, obeyed by
dispatchers and engines."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fabric.core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Degradation:
    """What holds now. All neutral: nothing is degraded.

    `draft_tokens`: the most tokens that speculation may draft a step (None: as configured; 0: no
    speculation). `batch_max_tokens`: outputs of the least important tier end there.
    `cheaper_version`: where requests of the tier `reroutes` go. `sheds`: tiers that are refused.
    """

    draft_tokens: int | None = None
    batch_max_tokens: int | None = None
    cheaper_version: str | None = None
    reroutes: str = ""
    sheds: tuple[str, ...] = ()
    why: str = ""


NOTHING = Degradation()


def degraded(request: Request, degradation: Degradation, *, batch: str) -> tuple[Request, str]:
    """The request as it is served now, and for its client in a word what it does without.

    `batch`: the name of the least important tier. Empty: it gets all that it asked for.
    """
    notes = []
    cap = degradation.batch_max_tokens
    if cap is not None and request.tier == batch and request.sampling.max_tokens > cap:
        least = max(cap, request.sampling.min_tokens)
        request = replace(request, sampling=replace(request.sampling, max_tokens=least))
        notes.append("max_tokens")
    version = degradation.cheaper_version
    if version is not None and request.tier == degradation.reroutes:
        request = replace(request, model_version=version)
        notes.append("version")
    return request, ", ".join(notes)
