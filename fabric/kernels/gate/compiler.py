"""Compiles one launch for a GPU that need not be here, and reads what came out.

triton brings NVIDIA's assembler and disassemblers; for AMD the assembly itself tells resources.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from fabric.kernels.copy_blocks import copy_blocks_kernel
from fabric.kernels.draw import draw_kernel
from fabric.kernels.embedding import embedding_kernel
from fabric.kernels.gate.hardware import Work
from fabric.kernels.kv_write import kv_write_kernel
from fabric.kernels.linear import logits_kernel
from fabric.kernels.moe_gemm import moe_gemm_kernel
from fabric.kernels.paged_attention import join_splits_kernel, paged_attention_kernel
from fabric.kernels.prefill_attention import prefill_attention_kernel
from fabric.kernels.quantize import quantize_kernel
from fabric.kernels.rms_norm import rms_norm_kernel
from fabric.kernels.rope import rope_kernel
from fabric.kernels.scaled_gemm import scaled_gemm_kernel, scaled_gemm_tma_kernel
from fabric.kernels.silu_mul import silu_mul_kernel

_KERNELS = (
    copy_blocks_kernel,
    draw_kernel,
    embedding_kernel,
    join_splits_kernel,
    kv_write_kernel,
    logits_kernel,
    moe_gemm_kernel,
    paged_attention_kernel,
    prefill_attention_kernel,
    quantize_kernel,
    rms_norm_kernel,
    rope_kernel,
    scaled_gemm_kernel,
    scaled_gemm_tma_kernel,
    silu_mul_kernel,
)

_TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# What stands for each instruction: in NVIDIA's machine code, in AMD's assembly.
_INSTRUCTIONS: Mapping[str, tuple[str, str]] = {
    "bf16 wgmma": (r"\bHGMMA\.", r"v_mfma_f32\w*bf16"),
    "fp8 wgmma": (r"\bQGMMA\.", r"v_mfma_f32\w*fp8"),
    "int8 wgmma": (r"\bIGMMA\.", r"v_mfma_i32\w*i8"),
    "mma": (r"\b[HIQ]MMA\.", r"v_mfma_"),
    "TMA": (r"\bUTMALDG\b", r"$^"),
    "16-byte loads": (r"\b(?:LDG\.E\S*|LDGSTS\.E\S*)\.128", r"(?:global|buffer)_load_dwordx4"),
    "stack": (r"\b(?:LDL|STL)\b", r"\bscratch_(?:load|store)"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One launch to compile. `kernel`: the function's name. `types` of the run-time arguments, in
    triton's words; `aligned`: integers that are multiples of 16 when it is launched. `expected`:
    names of instructions that must be there."""

    label: str
    target: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, int | float | bool], ...]
    warps: int
    stages: int
    expected: tuple[str, ...]
    work: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a kernel takes: registers of a thread, bytes of stack and shared memory, instructions
    that spill, and how often each instruction of interest is there."""

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    warps: int
    instructions: Mapping[str, int]


def build(case: Case, cache_folder: Path) -> Built:
    """Compile `case` (triton keeps the result in `cache_folder`, by a hash of source and options).

    Raises what triton raises for a kernel that does not compile.
    """
    function = next((each for each in _KERNELS if each.__name__ == case.kernel), None)
    if function is None:
        raise ValueError(f"there is no {case.kernel}")
    if not isinstance(function, JITFunction):
        raise ValueError(f"{case.kernel} is interpreted: TRITON_INTERPRET must not be set")
    triton.knobs.cache.dir = str(cache_folder)
    types, constants = dict(case.types), dict(case.constants)
    names = function.arg_names
    signature = {each: types.get(each, "constexpr") for each in names}
    aligned = [
        index
        for index, each in enumerate(names)
        if signature[each].startswith("*") or each in case.aligned
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(each),): value for each, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    kind, architecture, warp = _TARGETS[case.target]
    # Fused multiply-adds are asked for by name: triton is about to change its default.
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget(kind, architecture, warp), options=options)
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    if kind == "hip":
        return _read_amd(compiled.asm["amdgcn"], shared, warps)
    return _read_nvidia(compiled.asm["cubin"], shared, warps)


def attempt(case: Case, cache_folder: Path) -> Built | str:
    """What was built, or why it was not."""
    try:
        return build(case, cache_folder)
    except Exception as error:  # noqa: BLE001 - whatever the compiler says belongs into the table
        return f"does not compile: {str(error).strip().splitlines()[-1:] or [repr(error)]}"


def _read_nvidia(cubin: bytes, shared_bytes: int, warps: int) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = _counts(code, 0)
    return Built(
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        spills=found["stack"],
        shared_bytes=shared_bytes,
        warps=warps,
        instructions=found,
    )


def _read_amd(assembly: str, shared_bytes: int, warps: int) -> Built:
    return Built(
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        stack_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        shared_bytes=shared_bytes,
        warps=warps,
        instructions=_counts(assembly, 1),
    )


def _counts(code: str, which: int) -> dict[str, int]:
    return {name: len(re.findall(forms[which], code)) for name, forms in _INSTRUCTIONS.items()}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"the tool says nothing of {pattern}"
    return int(found[1])


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
