"""What a GPU has: limits that a kernel must keep, and the rates that bound its time.

Sources: NVIDIA H100 SXM5 data sheet and the CUDA programming guide, compute capability 9.0; AMD
MI300X data sheet and the CDNA 3 instruction set guide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Of the data sheet's rates, what well-made kernels reach; for estimates, not for the roofline.
BANDWIDTH_SHARE = 0.8
COMPUTE_SHARE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """`registers`: of one processor (SM, CU). `lanes`: of a warp. `shared_bytes`: of one block;
    a processor has `processor_shared_bytes`. Rates a second."""

    name: str
    processors: int
    lanes: int
    registers: int
    shared_bytes: int
    processor_shared_bytes: int
    warps: int
    blocks: int
    bytes_per_s: float
    operations_per_s: Mapping[str, float]

    def resident_blocks(self, *, registers: int, shared_bytes: int, warps: int) -> int:
        """Blocks of a kernel that one processor runs at once; registers are those of a thread,
        handed out to warps in 256s, and a block takes 1 KB of shared memory for itself."""
        by_registers = self.registers // (-(-registers * self.lanes // 256) * 256 * warps)
        by_shared = self.processor_shared_bytes // (shared_bytes + 1024)
        return min(self.blocks, self.warps // warps, by_registers, by_shared)

    def roofline_us(self, work: Work) -> float:
        """No kernel is faster than its bytes and its operations allow."""
        return 1e6 * max(
            work.bytes / self.bytes_per_s, work.operations / self.operations_per_s[work.unit]
        )

    def estimate_us(self, work: Work) -> float:
        """What to expect: the roofline at the shares that good kernels reach."""
        return 1e6 * max(
            work.bytes / (self.bytes_per_s * BANDWIDTH_SHARE),
            work.operations / (self.operations_per_s[work.unit] * COMPUTE_SHARE),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one launch must move and compute, at least. `unit`: which operations ("bf16", "fp8",
    "int8" on tensor cores; "fp32" outside of them). `shape`: for the reader."""

    shape: str
    bytes: float
    operations: float = 0.0
    unit: str = "fp32"


H100 = Gpu(
    name="H100 SXM",
    processors=132,
    lanes=32,
    registers=65536,
    shared_bytes=232_448,
    processor_shared_bytes=233_472,
    warps=64,
    blocks=32,
    bytes_per_s=3.35e12,
    operations_per_s={"fp32": 67e12, "bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
)
MI300X = Gpu(
    name="MI300X",
    processors=304,
    lanes=64,
    registers=131_072,
    shared_bytes=65_536,
    processor_shared_bytes=65_536 + 1024,
    warps=32,
    blocks=32,
    bytes_per_s=5.3e12,
    operations_per_s={"fp32": 163e12, "bf16": 1307e12, "fp8": 2614e12, "int8": 2614e12},
)
GPUS: Mapping[str, Gpu] = {"sm_90": H100, "gfx942": MI300X}
