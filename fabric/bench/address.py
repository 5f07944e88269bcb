"""The address of a server as people write it."""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

EXAMPLE = "http://127.0.0.1:8000"


def server_address(text: str) -> str:
    """`text` as a base URL; the type of every --url. Without a scheme it is http, and the /v1 that
    OpenAI's clients want at the end is left out. Raises `ArgumentTypeError`."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        fits = False
    if not fits or any(letter.isspace() for letter in url):
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a server, such as {EXAMPLE}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
