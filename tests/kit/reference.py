"""`Reference`: what transformers computes for a model folder, loaded once a dtype."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def reference_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The folder's model in transformers, on the CPU, with its plainest attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def reference_logits(
    folder: Path, tokens: list[int], dtype: torch.dtype, *, token_by_token: bool = False
) -> Tensor:
    """float32 [len(tokens), V]. `token_by_token`: with a KV cache, as a generation goes."""
    model = reference_model(folder, dtype)
    if not token_by_token:
        return model(torch.tensor([tokens])).logits[0].float()
    cache_, rows = None, []
    for token in tokens:
        output = model(torch.tensor([[token]]), past_key_values=cache_, use_cache=True)
        cache_ = output.past_key_values
        rows.append(output.logits[0, -1].float())
    return torch.stack(rows)
