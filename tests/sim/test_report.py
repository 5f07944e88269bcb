"""The report: one file with nothing from outside, its plots well-formed, its figures the run's."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from fabric.sim.command import main
from fabric.sim.costs import DEMO_CPU
from fabric.sim.records import Outcome, Sample
from fabric.sim.report import cdf, html
from fabric.sim.summary import summarize
from fabric.sim.svg import Axes, Series, lines
from fabric.sim.text import Run

DATA = Path(__file__).parent.parent / "data"
VOID = {"meta"}


class Balanced(HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    one, other = folder / "<one>.yaml", folder / "other.yaml"
    one.write_text("replicas: 1\n")
    other.write_text("autoscaling: {max_replicas: 3}\n")
    words = ["--trace", str(DATA / "azure2023_conv_300.csv"), "--requests", "60", "--rate", "9"]
    words += ["--profile", "A100:llama-8b", "--config", str(one), "--compare", str(other)]
    assert main([*words, "--html", str(folder / "report.html")]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_it_needs_nothing_from_outside(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not {"src", "href", "onload"} & set(parser.attributes)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme:dark" in page


def test_its_plots_are_well_formed_and_inside_their_frame(page: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(plots) >= 5 + 2 * 6, "five side by side, six a run"
    for plot in plots:
        root = ET.fromstring(plot)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for line in root.iter("polyline"):
            for pair in line.attrib["points"].split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_names_are_text_and_not_markup(page: str) -> None:
    assert "&lt;one&gt;.yaml" in page
    assert "<one>" not in page


def test_a_cdf_ends_at_one_and_only_rises() -> None:
    page = Outcome()
    assert cdf(page, lambda _: 1.0) == []
    chart = lines(Axes(title="t", x="x", y="y"), [Series(name="none", points=[])])
    assert chart == ""


def test_a_short_peak_is_not_thinned_away() -> None:
    """5,000 seconds, and in one of them ten wait."""
    outcome = Outcome(ended=5_000 * 10**9)
    for second in range(5_000):
        queued = 10 if second == 3_333 else 0
        outcome.samples.append(
            Sample(
                at=second * 10**9, ready=1, starting=0, draining=0,
                queued_requests=queued, queued_tokens=0, snapshots=(),
            )
        )  # fmt: skip
    run = Run(name="peak", profile=DEMO_CPU, outcome=outcome, summary=summarize(outcome))
    queue = next(p for p in re.findall(r"<svg.*?</svg>", html([run], "t")) if ">Queue<" in p)
    ys = {pair.split(",")[1] for pair in re.findall(r'points="([^"]*)"', queue)[0].split()}
    assert len(ys) == 2, "the peak is there"
