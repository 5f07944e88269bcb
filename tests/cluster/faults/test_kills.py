"""Something is killed at a random moment; every stream is what it is without. Seeds are kept.

`make test` kills workers of one group; `-m nightly` in every mode, 200 times. A seed that ever
failed stays in `KEPT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from kit.fabric_server import serving
from kit.fault_harness import Kill, Rounds, hang_worker, kill_replica, kill_worker
from kit.tiny_models import make_tiny_model

# Each with what it must go through: more requests than places, and KV for fewer than have one, so
# that sequences are swapped: not many more than the longest, in each of two workers half of it.
SMALL = """\
model: {name: m, threads: 1, context_limit: 1024}
kv: {device_bytes: %d, host_bytes: 8000000}
engine: {max_sequences: 6, step_tokens: 128, chunk_tokens: 64, step_deadline_s: 3}
"""
WHOLE, HALF = 3_000_000, 1_500_000
POOLS = """\
pools:
  prefill: {replicas: 1, chunk_tokens: 32}
  decode: {replicas: 1}
  min_prompt_tokens: 64
"""
MODES: dict[str, tuple[str, Sequence[Kill]]] = {
    "mixed": (SMALL % WHOLE + "replicas: 2\n", (kill_replica,)),
    "tp": (SMALL % HALF + "shard: {tp: 2}\n", (kill_worker, hang_worker, kill_worker)),
    "pp": (SMALL % HALF + "shard: {pp: 2}\n", (kill_worker, kill_worker, hang_worker)),
    "disaggregated": (SMALL % WHOLE + POOLS, (kill_replica,)),
}
KEPT = {
    "mixed": [1, 2, 3, 4],
    "tp": [1, 2, 3],
    "pp": [1, 2, 3],
    "disaggregated": [1, 2, 3, 4, 100, 105],
}


def rounds(folder: Path, mode: str, seeds: Sequence[int]) -> Rounds:
    """One kill for each seed, on one server."""
    # Wide, so that a step takes milliseconds and a kill finds work; 2 KB of KV a token.
    wide = {"intermediate_size": 32768, "num_key_value_heads": 4, "head_dim": 64}
    model = make_tiny_model(folder / "model", max_position_embeddings=1024, **wide)
    settings, kills = MODES[mode]
    config = folder / "config.yaml"
    config.write_text(settings)
    with serving(folder, str(model), "--config", str(config)) as server:
        found = Rounds(server, seed=0)
        for number, seed in enumerate(seeds):
            found.kill_once(seed, kills[number % len(kills)])
            server.processes()
        assert server.gauge("fabric_requests_resumed_total") > 0, "nothing was ever resumed"
        assert server.gauge("fabric_requests_poisonous_total") == 0
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["tp"])
def test_kept_seeds(mode: str, tmp_path: Path) -> None:
    rounds(tmp_path, mode, KEPT[mode])


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["mixed", "pp", "disaggregated"])
def test_kept_seeds_of_other_modes(mode: str, tmp_path: Path) -> None:
    rounds(tmp_path, mode, KEPT[mode])


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_kills(mode: str, tmp_path: Path) -> None:
    found = rounds(tmp_path, mode, range(100, 150))
    met = {"queued", "prefill", "decode", "swapped"}
    assert found.phases == (met | {"handing over"} if mode == "disaggregated" else met)
