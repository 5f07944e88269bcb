"""Small real tokenizers of both families, without torch: the gateway's tests start fast."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'function' %}{{ raise_exception('no functions here') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    "the quick brown fox jumps over lazy dogs and hello world tell me what you think of this one",
    "größer, schöner, weiter: Übung macht den Meister — 你好，世界 👩‍👩‍👧 🇩🇪 привет мир",
)


def byte_level(folder: Path, *, template: str | None = CHAT_TEMPLATE) -> Path:
    """GPT-2's kind: Llama 3, SmolLM2, Qwen."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<note>", special=False, normalized=False)])
    return _save(folder, tokenizer, template)


def sentence_piece(folder: Path, *, template: str | None = CHAT_TEMPLATE) -> Path:
    """Llama 2's kind: "▁" for a space, bytes as tokens where no other fits."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted(set("".join(TEXT[0].split())))
    vocab = {name: token for token, name in enumerate([*names, *letters, "▁t", "▁th", "he"])}
    merges = [("▁", "t"), ("▁t", "h"), ("h", "e")]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return _save(folder, tokenizer, template)


def _save(folder: Path, tokenizer: Tokenizer, template: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
