"""Every entry of the launch table as a case to compile, at the shapes of an 8B model in production:
hidden 4,096, 32 query and 8 kv heads, intermediate 14,336, vocabulary 128,256, pages of 16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fabric.kernels.gate.compiler import Case
from fabric.kernels.gate.hardware import Work
from fabric.kernels.launch import Launch
from fabric.kernels.launch_table import LaunchKey, LaunchTable

HIDDEN, HEADS, KV_HEADS, WIDE, VOCAB, PAGE = 4096, 32, 8, 14_336, 128_256, 16
CONTEXT = 4096  # keys that a decoding sequence sees
BATCH = 64  # decoding sequences
CHUNK = 2048  # tokens of a prefill step

Constants = Mapping[str, int | float | bool]
# Integers that shapes of models don't make multiples of 16.
_ODD = "rows heads window groups pairs experts share splits first".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """What the cases of one kernel share: `arguments` in order, "name:type" ("name" alone: i32)."""

    name: str
    arguments: str

    def case(
        self,
        key: LaunchKey,
        launch: Launch,
        target: str,
        *,
        formats: Mapping[str, str],
        **said: object,
    ) -> Case:
        constants, expected, work = said["constants"], said["expected"], said["work"]
        assert isinstance(constants, dict) and isinstance(expected, tuple)
        assert isinstance(work, Work)
        types = []
        for word in self.arguments.split():
            name, _, kind = word.partition(":")
            types.append((name, formats.get(kind, kind) or "i32"))
        sizes = {k: v for k, v in launch.sizes if k not in ("PROGRAMS", "SWAP") or k in constants}
        return Case(
            label=f"{key.operation} {key.form} {key.bucket}",
            target=target,
            kernel=self.name,
            types=tuple(types),
            aligned=tuple(name for name, kind in types if kind == "i32" and name not in _ODD),
            constants=tuple({**sizes, **constants}.items()),
            warps=launch.warps,
            stages=launch.stages,
            expected=expected,
            work=work,
        )


_KERNELS: Mapping[str, _Kernel] = {
    key: _Kernel(name=name, arguments=arguments)
    for key, name, arguments in (
        (
            "rms_norm",
            "rms_norm_kernel",
            (
                "x_ptr:*bf16 delta_ptr:*bf16 weight_ptr:*bf16 y_ptr:*bf16 rows heads width "
                "x_token y_token eps:fp32"
            ),
        ),
        (
            "rope",
            "rope_kernel",
            "x_ptr:*bf16 cos_ptr:*fp32 sin_ptr:*fp32 position_ptr:*i32 heads half x_token",
        ),
        ("silu_mul", "silu_mul_kernel", "x_ptr:*bf16 y_ptr:*bf16 width"),
        (
            "kv_write",
            "kv_write_kernel",
            (
                "k_ptr:*bf16 v_ptr:*bf16 k_pages_ptr:KV v_pages_ptr:KV slot_ptr:*i32 "
                "k_scale_ptr:*fp32 v_scale_ptr:*fp32 heads head_dim kv_token block_stride"
            ),
        ),
        (
            "embedding",
            "embedding_kernel",
            "token_ptr:*i32 table_ptr:*bf16 out_ptr:*bf16 first rows width",
        ),
        (
            "copy_blocks",
            "copy_blocks_kernel",
            "source_ptr:*i64 target_ptr:*i64 pair_ptr:*i32 words source_stride target_stride",
        ),
        (
            "draw",
            "draw_kernel",
            (
                "logits_ptr:*fp32 row_ptr:*i32 seed_ptr:*i64 choice_ptr:*i32 position_ptr:*i32 "
                "temperature_ptr:*fp32 top_p_ptr:*fp64 min_p_ptr:*fp32 top_k_ptr:*i32 "
                "out_ptr:*i32 vocab row_stride"
            ),
        ),
        (
            "quantize",
            "quantize_kernel",
            "x_ptr:*bf16 y_ptr:NARROW scale_ptr:*fp32 columns groups x_token",
        ),
        (
            "paged_attention",
            "paged_attention_kernel",
            (
                "q_ptr:*bf16 k_ptr:KV v_ptr:KV k_scale_ptr:*fp32 v_scale_ptr:*fp32 "
                "table_ptr:*i32 token_ptr:*i32 row_ptr:*i32 length_ptr:*i32 out_ptr:*fp32 "
                "sum_ptr:*fp32 scale:fp32 window head_dim q_token out_token out_head out_split "
                "block_stride table_width"
            ),
        ),
        (
            "prefill_attention",
            "prefill_attention_kernel",
            (
                "q_ptr:*bf16 k_ptr:KV v_ptr:KV k_scale_ptr:*fp32 v_scale_ptr:*fp32 "
                "table_ptr:*i32 start_ptr:*i32 count_ptr:*i32 first_ptr:*i32 row_ptr:*i32 "
                "tile_sequence_ptr:*i32 tile_row_ptr:*i32 out_ptr:*bf16 scale:fp32 window "
                "head_dim q_token out_token block_stride table_width"
            ),
        ),
        (
            "join_splits",
            "join_splits_kernel",
            (
                "partial_ptr:*fp32 sum_ptr:*fp32 token_ptr:*i32 length_ptr:*i32 out_ptr:*bf16 "
                "window head_dim heads splits out_token"
            ),
        ),
        (
            "logits",
            "logits_kernel",
            (
                "x_ptr:*bf16 row_ptr:*i32 weight_ptr:*bf16 bias_ptr:*bf16 out_ptr:*fp32 rows "
                "outputs inputs out_row"
            ),
        ),
        (
            "moe_gemm",
            "moe_gemm_kernel",
            (
                "x_ptr:*bf16 weight_ptr:*bf16 pair_ptr:*i32 expert_ptr:*i32 routing_ptr:*fp32 "
                "out_ptr:*bf16 pairs experts outputs inputs share"
            ),
        ),
        (
            "scaled_gemm",
            "scaled_gemm_kernel",
            (
                "a_ptr:NARROW b_ptr:NARROW a_scale_ptr:*fp32 b_scale_ptr:*fp32 bias_ptr:*bf16 "
                "out_ptr:*bf16 rows outputs inputs groups"
            ),
        ),
        (
            "scaled_gemm_tma",
            "scaled_gemm_tma_kernel",
            (
                "a_ptr:NARROW b_ptr:NARROW a_scale_ptr:*fp32 b_scale_ptr:*fp32 bias_ptr:*bf16 "
                "out_ptr:*bf16 rows outputs inputs groups"
            ),
        ),
    )
}


def cases(target: str) -> list[Case]:
    """One for each entry of the target's table, and for what entries launch beside."""
    table = LaunchTable(target)
    found = []
    for key, launch in table.entries().items():
        found.append(_MAKERS[key.operation](key, launch, target))
        if key.operation == "paged_attention" and key.form == "bf16":
            found.append(_join(key, launch, target))
    return found


def _rows(key: LaunchKey, launch: Launch, target: str) -> Case:
    width = 128 if key.bucket == "any" else int(key.bucket.split()[0])
    narrow = _narrow(key.form, target)
    largest = {"int8": 127.0, "fp8": 240.0 if target == "gfx942" else 448.0}.get(key.form, 0.0)
    tokens = CHUNK
    constants: dict[str, Constants] = {
        "rms_norm": {"HAS_DELTA": width > 128, "BLOCK": width},
        "rope": {"BLOCK": 64},
        "silu_mul": {},
        "kv_write": {"PAGE": PAGE, "FP8": key.form == "fp8", "BLOCK": 128},
        "embedding": {},
        "copy_blocks": {},
        "draw": {},
        "quantize": {"LARGEST": largest, "INTEGER": key.form == "int8", "BLOCK": width},
    }
    works = {
        "rms_norm": Work(
            shape=f"{tokens} x {width}", bytes=tokens * width * (4 if width == 128 else 8)
        ),
        "rope": Work(shape=f"{tokens} x 40 heads", bytes=tokens * 40 * 128 * 4),
        "silu_mul": Work(shape=f"{tokens} x {WIDE}", bytes=tokens * WIDE * 6),
        "kv_write": Work(shape=f"{tokens} x 8 heads", bytes=tokens * 2 * KV_HEADS * 128 * 4),
        "embedding": Work(shape=f"{tokens} x {HIDDEN}", bytes=tokens * HIDDEN * 4),
        "copy_blocks": Work(shape="16 blocks of 2 MiB", bytes=2 * 16 * 2**21),
        # The row lies in L2; about 70 passes over it, two operations an element a pass.
        "draw": Work(
            shape=f"{BATCH} x {VOCAB}", bytes=BATCH * VOCAB * 4, operations=BATCH * VOCAB * 140
        ),
        "quantize": Work(shape=f"{tokens} x {width}", bytes=tokens * width * 3),
    }
    wide_loads = key.bucket != "128 wide" or key.operation == "rms_norm"
    return _KERNELS[key.operation].case(
        key,
        launch,
        target,
        formats={"KV": narrow if key.form == "fp8" else "*bf16", "NARROW": narrow},
        constants=constants[key.operation],
        expected=("16-byte loads",) if wide_loads else (),
        work=works[key.operation],
    )


def _attention(key: LaunchKey, launch: Launch, target: str) -> Case:
    head_dim = int(key.bucket.split()[1])
    fp8 = key.form == "fp8"
    decode = key.operation == "paged_attention"
    constants: Constants = {"GROUP": HEADS // KV_HEADS, "DIM": head_dim, "PAGE": PAGE, "FP8": fp8}
    keys = BATCH * CONTEXT if decode else CHUNK
    # Decoding reads every key once; a chunk's queries see half of its square.
    pairs = keys if decode else CHUNK * CHUNK / 2
    work = Work(
        shape=f"{BATCH} x {CONTEXT} keys" if decode else f"a prompt of {CHUNK}",
        bytes=keys * 2 * KV_HEADS * head_dim * (1 if fp8 else 2)
        + (0 if decode else CHUNK * HEADS * head_dim * 4),
        operations=pairs * HEADS * head_dim * 4,
        unit="bf16",
    )
    if decode:
        constants = {**constants, "ROWS": 16, "SPLIT": True}
    return _KERNELS[key.operation].case(
        key,
        launch,
        target,
        formats={"KV": _narrow("fp8", target) if fp8 else "*bf16"},
        constants=constants,
        expected=("16-byte loads", "mma" if decode or target != "sm_90" else "bf16 wgmma"),
        work=work,
    )


def _join(key: LaunchKey, launch: Launch, target: str) -> Case:
    head_dim = int(key.bucket.split()[1])
    splits = CONTEXT // launch.size("SPLIT_KEYS")
    beside = LaunchKey(operation="join_splits", form="fp32", bucket=key.bucket)
    return _KERNELS["join_splits"].case(
        beside,
        Launch(sizes=(), warps=2, stages=2),
        target,
        formats={},
        constants={"SPLIT_KEYS": launch.size("SPLIT_KEYS"), "DIM": head_dim},
        expected=(),
        work=Work(
            shape=f"{BATCH} x {splits} splits", bytes=BATCH * HEADS * splits * (head_dim + 1) * 4
        ),
    )


def _product(key: LaunchKey, launch: Launch, target: str) -> Case:
    rows = {"16 rows": 16, "64 rows": 64, "many rows": CHUNK}[key.bucket]
    sizes = dict(launch.sizes)
    unit = "bf16" if key.form == "bf16" else "int8" if key.form == "int8" else "fp8"
    width = 2 if key.form == "bf16" else 1
    name = key.operation
    constants: Constants
    outputs, weights, note = 2 * WIDE, 2 * WIDE, ""
    if key.operation == "logits":
        outputs = weights = VOCAB
        constants = {"HAS_BIAS": False}
    elif key.operation == "moe_gemm":
        outputs, weights, note = WIDE, WIDE * 8, ", 8 experts"
        constants = {"WEIGHTED": False}
    else:
        constants = {"HAS_BIAS": False, "INTEGER": unit == "int8", "BLOCKED": "blocks" in key.form}
        if "PROGRAMS" in sizes:
            name, constants = "scaled_gemm_tma", {**constants, "PROGRAMS": sizes["PROGRAMS"]}
        else:
            constants = {**constants, "SWAP": bool(sizes.get("SWAP", 0))}
    fills_wgmma = target == "sm_90" and (sizes["BLOCK_M"] >= 64 or sizes.get("SWAP", 0))
    wide_loads = "TMA" if name == "scaled_gemm_tma" else "16-byte loads"
    return _KERNELS[name].case(
        key,
        launch,
        target,
        formats={"NARROW": _narrow(unit, target)},
        constants=constants,
        expected=(wide_loads, f"{unit} wgmma" if fills_wgmma else "mma"),
        work=Work(
            shape=f"{rows} x {outputs} x {HIDDEN}{note}",
            bytes=weights * HIDDEN * width + rows * (HIDDEN * width + outputs * 2),
            operations=2.0 * rows * outputs * HIDDEN,
            unit=unit,
        ),
    )


def _narrow(form: str, target: str) -> str:
    if form == "int8":
        return "*i8"
    return "*fp8e4b8" if target == "gfx942" else "*fp8e4nv"


_MAKERS: Mapping[str, Callable[[LaunchKey, Launch, str], Case]] = {
    **dict.fromkeys(
        "rms_norm rope silu_mul kv_write embedding copy_blocks draw quantize".split(), _rows
    ),
    **dict.fromkeys(("paged_attention", "prefill_attention"), _attention),
    **dict.fromkeys(("logits", "moe_gemm", "scaled_gemm"), _product),
}
