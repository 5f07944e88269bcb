"""`fabric quantize` writes a folder, `fabric serve FOLDER` answers from it over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit.fabric_server import serving
from kit.quantized_models import TEXT
from kit.tiny_models import make_tiny_model

from fabric.driver import LLM, SamplingParams
from fabric.model.quantize import WISHES, Wish, quantize_model

PROMPTS = ("the quick brown fox", "hello world", "lazy dogs jump over", "brown dogs and the world")
TOKENS = 12


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_folder_of_int4_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's weights lie on no grid: int4 may err here as it likes. Each answer, alone
    and among others, is what the same weights say in this process."""
    wish = Wish(candidates=WISHES["int4"].candidates[:1], budget=float("inf"))
    monkeypatch.setattr("fabric.model.quantize.WISHES", {"int4": wish})
    source, folder = make_tiny_model(tmp_path / "source"), tmp_path / "int4"
    rounded = quantize_model(source, folder, "int4", tokens=TEXT)
    assert {one.name for one in rounded} == {"int4"}
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    llm = LLM(str(folder), device_bytes=16 << 20, host_bytes=0, threads=1)
    assert "int4" in llm.worker.description
    expected = [llm.generate([one], params, progress=False)[0].text for one in PROMPTS]
    assert len(set(expected)) > 1

    config = tmp_path / "config.yaml"
    pools = "kv: {device_bytes: 16777216, host_bytes: 0}"
    config.write_text(f"{pools}\nmodel: {{name: tiny, threads: 1}}\n")
    with serving(tmp_path, str(folder), "--config", str(config)) as server:

        def ask(prompt: str) -> str:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            answer = server.post("/v1/completions", body | {"ignore_eos": True})
            assert answer.status == 200, answer.text
            text: str = answer.json()["choices"][0]["text"]
            return text

        assert [ask(prompt) for prompt in PROMPTS] == expected
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(ask, PROMPTS)) == expected
