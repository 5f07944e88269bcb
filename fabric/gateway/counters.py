"""What the gateway counts: answers by route and status, unknown fields, clients that left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

# A client invents field names at will; the number of series must not follow.
MAX_FIELD_NAMES = 64
MAX_FIELD_CHARS = 48
OTHER = "(other)"


class GatewayCounters:
    """Counts since start of one gateway. `exposition` makes Prometheus text of `samples()`."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, int]] = Counter()
        self._unknown: Counter[str] = Counter()
        self._disconnects = 0
        self.open = 0  # requests in flight now

    def answered(self, route: str, status: int) -> None:
        """One request is over. `route` is a path of the app, never one that a client made up."""
        self._answers[route, status] += 1

    def disconnected(self) -> None:
        """A client left before its answer was complete."""
        self._disconnects += 1

    def unknown_fields(self, names: list[str]) -> None:
        """Fields that were accepted and ignored."""
        for name in names:
            sane = len(name) <= MAX_FIELD_CHARS and name.isascii() and name.isidentifier()
            known = name in self._unknown or len(self._unknown) < MAX_FIELD_NAMES
            self._unknown[name if sane and known else OTHER] += 1

    def samples(self) -> dict[str, float]:
        """Prometheus series -> value, as plain data that can cross a process border."""
        found = {
            f'fabric_http_responses_total{{route="{route}",status="{status}"}}': float(count)
            for (route, status), count in self._answers.items()
        }
        found |= {
            f'fabric_unknown_fields_total{{field="{name}"}}': float(count)
            for name, count in self._unknown.items()
        }
        found["fabric_client_disconnects_total"] = float(self._disconnects)
        found["fabric_http_open_requests"] = float(self.open)
        return found


def exposition(samples: Mapping[str, float], others: Mapping[str, str] | None = None) -> str:
    """Prometheus text of `GatewayCounters.samples()` (or a fleet's sum of them). `others`: what
    series that are not the gateway's mean, by name."""
    meaning = {**_HELP, **(others or {})}
    lines: list[str] = []
    described = ""
    for series in sorted(samples):
        name = series.split("{")[0]
        if name != described:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {meaning[name]}", f"# TYPE {name} {kind}"]
            described = name
        lines.append(f"{series} {samples[series]:.17g}")  # exact: rates are made of differences
    return "\n".join(lines) + "\n"


_HELP: Mapping[str, str] = {
    "fabric_http_responses_total": "HTTP answers by route and status.",
    "fabric_unknown_fields_total": "Request fields that were accepted and ignored.",
    "fabric_client_disconnects_total": "Clients that left before their answer was complete.",
    "fabric_http_open_requests": "HTTP requests in flight.",
}
