"""The bytes of every token: with them, turning tokens into text is one table look-up a token.

Both families of tokenizers in use allow it:

    ByteLevel   (GPT-2, Llama 3, SmolLM2, Qwen)   each character of a token stands for one byte
    ByteFallback (SentencePiece: Llama 2, Mistral) "▁" is a space, "<0xE2>" a byte, the rest UTF-8

The text of a generation is the UTF-8 of its tokens' bytes. (`Tokenizer.decode` also strips the
space before the first word of a SentencePiece text; in a continuation that space is real.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabric.core.errors import ModelError

UNDERLINE = "▁"  # SentencePiece's sign for a space


class Pieces:
    """Token id -> bytes. Ids that no token has (a padded vocabulary) have none."""

    __slots__ = ("spelled", "visible")

    def __init__(self, description: Mapping[str, Any], vocab: int) -> None:
        """`description`: the parsed tokenizer.json. Raises `ModelError` for a foreign decoder."""
        names = _names(description)
        added = {int(t["id"]): t for t in description.get("added_tokens", ())}
        size = max(vocab, 1 + max([*names, *added], default=0))
        spell = _spelling(description.get("decoder"))
        self.spelled = [b""] * size  # special tokens too
        for token, name in names.items():
            self.spelled[token] = spell(name)
        for token, entry in added.items():
            self.spelled[token] = spell(entry["content"])
        self.visible = list(self.spelled)  # special tokens blank
        for token, entry in added.items():
            if entry.get("special"):
                self.visible[token] = b""

    def __len__(self) -> int:
        """Ids that can be spelled, existing or padding."""
        return len(self.spelled)


class _ByteLevel:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 and up."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable}
        self._bytes |= {chr(256 + place): byte for place, byte in enumerate(others)}

    def __call__(self, name: str) -> bytes:
        try:
            return bytes([self._bytes[character] for character in name])
        except KeyError:  # an added token in plain text
            return name.encode("utf-8", "replace")


class _ByteFallback:
    """SentencePiece's spelling."""

    def __call__(self, name: str) -> bytes:
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            try:
                return bytes([int(name[3:5], 16)])
            except ValueError:
                pass
        return name.replace(UNDERLINE, " ").encode("utf-8", "replace")


def _spelling(decoder: Mapping[str, Any] | None) -> _ByteLevel | _ByteFallback:
    parts = decoder.get("decoders", [decoder]) if decoder else []
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _ByteLevel()
    if kinds & {"ByteFallback", "Metaspace"}:
        return _ByteFallback()
    raise ModelError(f"a tokenizer with the decoder {sorted(kinds) or None} is not supported")


def _names(description: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [name, score] in the order of ids
        return {token: entry[0] for token, entry in enumerate(vocabulary)}
    return {token: name for name, token in vocabulary.items()}
