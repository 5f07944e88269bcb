"""Which requests can never run in an engine, whatever else it does."""

from __future__ import annotations

from fabric.core.configs import EngineConfig
from fabric.core.request import Request


def why_never(request: Request, config: EngineConfig) -> str | None:
    """A sentence for the client, or None: it can run."""
    sampling, limit = request.sampling, config.context_limit
    if not request.prompt:
        return "the prompt is empty"
    if sampling.n < 1 or sampling.max_tokens < 1:
        return "n and max_tokens must be at least 1"
    if len(request.generated) > sampling.n:
        return "more resumed choices than n"
    over = frozenset(request.over)
    if len(over) != len(request.over) or not over < frozenset(range(sampling.n)):
        return "all choices are over, or one that there is not"
    if len(request.prompt) >= limit:
        return f"the prompt has {len(request.prompt)} tokens and the context {limit}"
    # The last token is never computed, so it needs no place in the KV pool.
    longest = min(len(request.prompt) + sampling.max_tokens, limit) - 1
    blocks = -(-longest // config.block_size)
    if blocks > config.num_blocks:
        return (
            f"prompt and output need {blocks} KV blocks of {config.block_size} tokens "
            f"and this replica has {config.num_blocks}"
        )
    return None
