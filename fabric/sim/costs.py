"""What a step takes, where no hardware is asked: measured tables, and a roofline for known GPUs.

Both see a step as its `StepShape`: how many tokens go through the linear layers, and how much of
the KV pool attention reads. Everything else about a step (who, which blocks) costs nothing here.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Protocol

from fabric.core.configs import EngineConfig, PreemptionCosts, StepCosts
from fabric.core.engine.plan import StepPlan

NS_PER_S = 1_000_000_000
BYTES_BF16 = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a plan asks of the hardware.

    `tokens`: through the linear layers. `rows`: sequences. `context`: KV tokens read, once a row.
    `pairs`: (query, key) pairs of rows with more than one token; `copies`: blocks moved.
    Of those rows again, `chunks`: how many, `chunk_tokens` and `chunk_context`: their part.
    """

    rows: int
    tokens: int
    context: int
    pairs: int
    copies: int
    chunks: int = 0
    chunk_tokens: int = 0
    chunk_context: int = 0


def shape_of(plan: StepPlan) -> StepShape:
    """The shape of a plan. O(rows)."""
    tokens = context = pairs = chunks = chunk_tokens = chunk_context = 0
    for step in plan.steps:
        count = step.count
        end = step.start + count
        tokens += count
        context += end
        if count > 1:
            pairs += count * (step.start + end + 1) // 2
            chunks += 1
            chunk_tokens += count
            chunk_context += end
    return StepShape(
        rows=len(plan.steps),
        tokens=tokens,
        context=context,
        pairs=pairs,
        copies=len(plan.copies),
        chunks=chunks,
        chunk_tokens=chunk_tokens,
        chunk_context=chunk_context,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLink:
    """Between two replicas that hand KV over: one group after the other."""

    bytes_per_s: float = 25e9  # 200 Gbit/s
    latency_ns: int = 1_000_000


class Costs(Protocol):
    """A cost model: `MeasuredCosts`, `Roofline`, `kernel_tables.KernelTables`."""

    def step_ns(self, shape: StepShape) -> int:
        """From handing a plan to the worker until its result is there, ns; at least 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """A table of step times by token count, linear between its rows and beyond the last one.

    `table`: (tokens, ns) of steps without context, tokens rising. `ns_per_context` for each KV
    token that a row reads, `ns_per_pair` for each (query, key) pair of a prompt's chunk,
    `ns_per_row` for sampling, `ns_per_copy` for a block.
    """

    table: tuple[tuple[int, int], ...]
    ns_per_context: float
    ns_per_pair: float
    ns_per_row: int
    ns_per_copy: int

    def step_ns(self, shape: StepShape) -> int:
        """See `Costs`."""
        if not shape.rows:  # copies alone: no layer runs
            return max(1, self.ns_per_copy * shape.copies)
        attention = self.ns_per_context * shape.context + self.ns_per_pair * shape.pairs
        rest = self.ns_per_row * shape.rows + self.ns_per_copy * shape.copies
        return max(1, round(self._linears(shape.tokens) + attention + rest))

    def _linears(self, tokens: int) -> float:
        table = self.table
        high = min(max(bisect_left(table, (tokens,)), 1), len(table) - 1)
        (x0, y0), (x1, y1) = table[high - 1], table[high]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator: dense bf16 peak, memory bandwidth and size, from its maker's data sheet.

    `fp8`: it multiplies FP8 twice as fast. `dollars_per_hour`: an assumption, about what a rented
    one cost in 2025; providers differ by a factor of two.
    """

    name: str
    flops: float
    bytes_per_s: float
    memory_bytes: int
    fp8: bool = False
    dollars_per_hour: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a decoder weighs: parameters that a token passes through, and its KV."""

    name: str
    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def kv_bytes(self) -> int:
        """Of one token in bf16, keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * BYTES_BF16


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The slower of arithmetic and memory, for linears and for attention, plus a constant.

    Williams, Waterman, Patterson, "Roofline" (2009). `efficiency`: the share of either peak that
    real kernels reach. `gpus`: a tensor-parallel group shares both; `overhead_ns` (launches,
    sampling, all-reduces) does not shrink with it. `fp8`: weights and products of the linears;
    attention and KV stay in bf16.
    """

    gpu: Gpu
    model: ModelShape
    gpus: int = 1
    efficiency: float = 0.7
    overhead_ns: int = 4_000_000
    link_bytes_per_s: float = 25e9
    fp8: bool = False

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return self.model.parameters * (1 if self.fp8 else BYTES_BF16)

    def step_ns(self, shape: StepShape) -> int:
        """See `Costs`."""
        copies = shape.copies * BLOCK_SIZE * self.model.kv_bytes / self.link_bytes_per_s
        if not shape.rows:  # copies alone: no layer runs
            return max(1, round(copies * NS_PER_S))
        flops = self.gpu.flops * self.gpus * self.efficiency
        memory = self.gpu.bytes_per_s * self.gpus * self.efficiency
        model = self.model
        linear_flops = flops * (2 if self.fp8 else 1)
        linears = max(
            2 * model.parameters * shape.tokens / linear_flops, self.weight_bytes / memory
        )
        # A (query, key) pair costs a multiplication and an addition for q·k and for p·v, per head.
        pairs = shape.pairs + shape.context
        pair_flops = 4 * model.heads * model.head_size * model.layers
        attention = max(pair_flops * pairs / flops, model.kv_bytes * shape.context / memory)
        return self.overhead_ns + round((linears + attention + copies) * NS_PER_S)

    def blocks(self, share: float = 0.9) -> int:
        """KV blocks that fit beside the weights in this share of the memory."""
        room = share * self.gpu.memory_bytes * self.gpus - self.weight_bytes
        if room <= 0:
            raise ValueError(f"{self.model.name} does not fit into {self.gpus} × {self.gpu.name}")
        return int(room) // (BLOCK_SIZE * self.model.kv_bytes)


BLOCK_SIZE = 16

GPUS = (
    Gpu(
        name="H200",
        flops=989e12,
        bytes_per_s=4.8e12,
        memory_bytes=141 * 10**9,
        fp8=True,
        dollars_per_hour=3.5,
    ),
    Gpu(
        name="H100",
        flops=989e12,
        bytes_per_s=3.35e12,
        memory_bytes=80 * 10**9,
        fp8=True,
        dollars_per_hour=2.5,
    ),
    Gpu(
        name="A100",
        flops=312e12,
        bytes_per_s=2.04e12,
        memory_bytes=80 * 10**9,
        fp8=False,
        dollars_per_hour=1.5,
    ),
    Gpu(
        name="L40S",
        flops=362e12,
        bytes_per_s=0.864e12,
        memory_bytes=48 * 10**9,
        fp8=True,
        dollars_per_hour=1.0,
    ),
    Gpu(
        name="RTX4090",
        flops=165e12,
        bytes_per_s=1.008e12,
        memory_bytes=24 * 10**9,
        fp8=True,
        dollars_per_hour=0.4,
    ),
    Gpu(
        name="L4",
        flops=121e12,
        bytes_per_s=0.3e12,
        memory_bytes=24 * 10**9,
        fp8=True,
        dollars_per_hour=0.7,
    ),
)
MODELS = (
    ModelShape(
        name="llama-8b", parameters=8_030_000_000, layers=32, heads=32, kv_heads=8, head_size=128
    ),
    ModelShape(
        name="llama-70b", parameters=70_600_000_000, layers=80, heads=64, kv_heads=8, head_size=128
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A replica by name: what its steps take, and the engine that it has room for.

    `kv_bytes`: of one token. `estimate`: arithmetic, nobody has measured it.
    `dollars_per_hour`: what a replica is taken to cost; None: no price. `front_ns`: what HTTP takes
    until a request is with its dispatcher. `kv_link`: of a replica, where KV is handed over.
    """

    name: str
    costs: Costs
    engine: EngineConfig
    gpus: int = 0
    kv_bytes: int = 0
    estimate: bool = False
    dollars_per_hour: float | None = None
    front_ns: int = 0
    kv_link: KvLink = field(default_factory=KvLink)

    def measured_engine(self) -> EngineConfig:
        """The engine as it is after its warm-up: it knows about what steps take."""
        return replace(self.engine, costs=step_costs(self.costs))


def step_costs(costs: Costs) -> StepCosts:
    """What a warm-up would find: a cost model by its differences, each at least 1 ns."""

    def took(rows: int = 1, tokens: int = 1, context: int = 0, pairs: int = 0) -> int:
        shape = StepShape(rows=rows, tokens=tokens, context=context, pairs=pairs, copies=0)
        return costs.step_ns(shape)

    one = took()
    token_ns = (took(tokens=257) - one) / 256
    decode_ns = (took(rows=33, tokens=33) - one) / 32
    return StepCosts(
        step_ns=max(one - decode_ns, 1.0),
        token_ns=max(token_ns, 1.0),
        decode_ns=max(decode_ns, 1.0),
        context_ns=max((took(context=10_000) - one) / 10_000, 1.0),
        pair_ns=max((took(pairs=1_000_000) - one) / 1_000_000, 1.0),
    )


def profile(name: str) -> Profile:
    """`demo-cpu` (measured), or GPU:MODEL[:COUNT][:fp8] (roofline): "H100:llama-8b:2:fp8".

    Raises `ValueError` that lists the names there are.
    """
    if name == DEMO_CPU.name:
        return DEMO_CPU
    gpu_name, _, rest = name.partition(":")
    model_name, *more = rest.split(":")
    fp8 = more[-1:] == ["fp8"]
    count = "1" if len(more) == fp8 else more[0]
    gpu = next((one for one in GPUS if one.name == gpu_name), None)
    model = next((one for one in MODELS if one.name == model_name), None)
    known = gpu is not None and model is not None and len(more) - fp8 <= 1
    if gpu is None or model is None or not known or not count.isdigit() or int(count) < 1:
        gpus, models = (", ".join(one.name for one in those) for those in (GPUS, MODELS))
        raise ValueError(
            f"no profile {name!r}; there are {DEMO_CPU.name} and GPU:MODEL[:COUNT][:fp8] with one "
            f"of {gpus} and one of {models}"
        )
    if fp8 and not gpu.fp8:
        raise ValueError(f"profile {name!r}: a {gpu.name} does not multiply fp8")
    costs = Roofline(gpu=gpu, model=model, gpus=int(count), fp8=fp8)
    recompute_ns = round(2 * model.parameters / (gpu.flops * costs.gpus * costs.efficiency) * 1e9)
    swap_ns = round(BLOCK_SIZE * model.kv_bytes / costs.link_bytes_per_s * 1e9)
    engine = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=costs.blocks(),
        num_host_blocks=costs.blocks() // 4,
        max_sequences=256,
        step_tokens=2048,
        chunk_tokens=2048,
        context_limit=32_768,
        preemption=PreemptionCosts(swap_ns_per_block=swap_ns, recompute_ns_per_token=recompute_ns),
    )
    dollars = gpu.dollars_per_hour
    return Profile(
        name=name,
        costs=costs,
        engine=engine,
        gpus=costs.gpus,
        kv_bytes=model.kv_bytes,
        estimate=True,
        dollars_per_hour=None if dollars is None else dollars * costs.gpus,
    )


# SmolLM2-135M-Instruct in bf16 on two AVX2 cores, where one server runs at a time.
DEMO_CPU = Profile(
    name="demo-cpu",
    kv_bytes=23_040,
    # Ray's object store: 8 to 25 ms to put 16 MB, a checksum of 2.1 GB/s, a copy on either side.
    kv_link=KvLink(bytes_per_s=0.5e9, latency_ns=5_000_000),
    costs=MeasuredCosts(
        table=(
            (1, 25_000_000),
            (8, 45_000_000),
            (16, 64_000_000),
            (64, 202_000_000),
            (128, 409_000_000),
            (1024, 3_300_000_000),
        ),
        ns_per_context=4_500.0,
        ns_per_pair=100.0,
        ns_per_row=40_000,
        ns_per_copy=100_000,
    ),
    engine=EngineConfig(
        num_blocks=2_900,
        num_host_blocks=728,
        context_limit=8_192,
        preemption=PreemptionCosts(swap_ns_per_block=100_000, recompute_ns_per_token=3_200_000),
    ),
)
