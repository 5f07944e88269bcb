"""Puts new keys and values into their pages, rounded to fp8 on the way if the pages are fp8.

Shape legend: T tokens, X blocks, G kv heads, P page (positions a block), E head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch

E4M3_MAX = 448.0  # of float8_e4m3fn; e4m3fnuz (AMD's gfx942) ends at 240


def kv_write_reference(
    pages_XGPE: Tensor, x_TGE: Tensor, slots_T: Tensor, scale_G: Tensor | None = None
) -> None:
    """pages[slot // P, :, slot % P] = x / scale; a slot of -1 is skipped.

    Without a scale x is only converted. fp8 pages saturate at 448: beyond it there is no number.
    """
    page = pages_XGPE.shape[2]
    kept = slots_T >= 0
    slots, x = slots_T[kept].long(), x_TGE[kept].float()
    if scale_G is not None:
        x = x / scale_G[:, None]
    if pages_XGPE.dtype == torch.float8_e4m3fn:
        x = x.clamp(-E4M3_MAX, E4M3_MAX)
    # Through a view of bytes where needed: torch has no indexed assignment of fp8.
    x = x.to(pages_XGPE.dtype)
    if pages_XGPE.element_size() == 1:
        pages_XGPE, x = pages_XGPE.view(torch.uint8), x.view(torch.uint8)
    pages_XGPE[slots // page, :, slots % page] = x


@triton.jit
def kv_write_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_pages_ptr: tl.tensor,
    v_pages_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    heads: tl.tensor,
    head_dim: tl.tensor,
    kv_token: tl.tensor,
    block_stride: tl.tensor,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """HEADS kv heads of one token a program, keys and values."""
    token = tl.program_id(0)
    slot = tl.load(slot_ptr + token)
    if slot < 0:  # padding of a captured graph
        return
    head_G = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, BLOCK)
    mask = (head_G < heads)[:, None] & (col < head_dim)[None, :]
    source = token.to(tl.int64) * kv_token + head_G[:, None] * head_dim + col[None, :]
    block = (slot // PAGE).to(tl.int64)
    target = block * block_stride + (
        (head_G[:, None] * PAGE + slot % PAGE) * head_dim + col[None, :]
    )
    k = tl.load(k_ptr + source, mask=mask, other=0.0)
    v = tl.load(v_ptr + source, mask=mask, other=0.0)
    if FP8:
        k_scale = tl.load(k_scale_ptr + head_G, mask=head_G < heads, other=1.0)[:, None]
        v_scale = tl.load(v_scale_ptr + head_G, mask=head_G < heads, other=1.0)[:, None]
        # div_rn: the reference's rounding, not the approximate division of the hardware.
        k = tl.clamp(tl.div_rn(k.to(tl.float32), k_scale), -448.0, 448.0)
        v = tl.clamp(tl.div_rn(v.to(tl.float32), v_scale), -448.0, 448.0)
    tl.store(k_pages_ptr + target, k.to(k_pages_ptr.dtype.element_ty), mask=mask)
    tl.store(v_pages_ptr + target, v.to(v_pages_ptr.dtype.element_ty), mask=mask)


def kv_write(
    kv_TKGE: Tensor,
    pages_XKGPE: Tensor,
    slots_T: Tensor,
    *,
    scales_KG: Tensor | None = None,
    launch: Launch,
) -> None:
    """Scatter keys and values ([T, 2, G, E]; heads side by side, tokens any stride apart) to
    `pages_XKGPE` ([X, 2, G, P, E] of one layer; blocks any stride apart) at `slots_T` (int32,
    block * P + place; -1 skips the token). fp8 pages need `scales_KG`, float32 [2, G], contiguous.
    """
    tokens, _, heads, head_dim = kv_TKGE.shape
    page = pages_XKGPE.shape[3]
    fp8 = pages_XKGPE.dtype == torch.float8_e4m3fn
    if fp8 != (scales_KG is not None):
        raise ValueError("fp8 pages need scales, and only they")
    if kv_TKGE.stride()[2:] != (head_dim, 1) or not pages_XKGPE[0].is_contiguous():
        raise ValueError("kv_write needs heads side by side, and pages without gaps")
    k, v = kv_TKGE.unbind(1)
    k_pages, v_pages = pages_XKGPE.unbind(1)
    k_scale, v_scale = (k, v) if scales_KG is None else scales_KG.unbind(0)
    step = launch.size("HEADS")
    kv_write_kernel[(tokens, triton.cdiv(heads, step))](
        k,
        v,
        k_pages,
        v_pages,
        slots_T,
        k_scale,
        v_scale,
        heads,
        head_dim,
        kv_TKGE.stride(0),
        pages_XKGPE.stride(0),
        PAGE=page,
        FP8=fp8,
        HEADS=step,
        BLOCK=triton.next_power_of_2(head_dim),
        **launch.options(),
    )
