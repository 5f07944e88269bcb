"""A simulation's journal: whole systems replayed, and a request's way told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fabric.cli import main
from fabric.core.configs import AdmissionConfig, AutoscalerConfig
from fabric.core.journal import Recorder
from fabric.journal.writer import Place, Writer
from fabric.sim.costs import DEMO_CPU
from fabric.sim.simulation import Plan, Simulation
from fabric.workload import Arrivals, generate, workload


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dispatchers, replicas that come and go, more to do than they can."""
    made = tmp_path_factory.mktemp("journal")
    place = Place(folder=made, stream="simulation", name="s", run="0", file_bytes=1 << 16, files=99)
    writer = Writer(place, background=False)
    plan = Plan(
        profile=DEMO_CPU,
        replicas=1,
        dispatchers=2,
        admission=AdmissionConfig(max_queued_requests=30),
        autoscaler=AutoscalerConfig(min_replicas=1, max_replicas=3),
    )
    requests = generate(
        workload("mixed"), count=24, seed="journal", arrivals=Arrivals(rate_per_s=3.0)
    )
    simulation = Simulation(plan, requests)
    simulation.watch(Recorder(writer))
    simulation.run()
    simulation.check()
    writer.close()
    assert len(list(made.iterdir())) > 1, "never rotated"
    return made


def test_the_whole_system_decides_the_same_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(folder)]) == 0
    assert "every outcome is the same" in capsys.readouterr().out


def test_a_wait_for_head_room_names_the_replicas_and_their_prices(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "journal/mixed/20", "--journal", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "its turn, but replicas: r0" in said, said
    assert "but no head-room" in said and " for head-room" in said.splitlines()[-1]
    chosen = re.search(r"goes to (r\d+): done in ([\d,]+ ms)", said)
    assert chosen is not None
    assert f"{chosen[1]} {chosen[2]}" in said.split("goes to")[1].split("replicas: ")[1]
