"""The simulator: deterministic, loses nothing, and drives the core as the cluster does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fabric.core.configs import AdmissionConfig, EngineConfig
from fabric.core.request import Finish, Request, SamplingParams
from fabric.sim.clock import NS_PER_MS, NS_PER_S, Clock
from fabric.sim.costs import DEMO_CPU, MeasuredCosts, Profile, StepShape, profile
from fabric.sim.dispatcher import Network
from fabric.sim.records import Outcome
from fabric.sim.scenarios import SCENARIOS, Scenario
from fabric.sim.simulation import Arrival, Plan, Simulation
from fabric.workload import Arrivals, Lengths, Workload, generate, workload

MS = NS_PER_MS
# 10 ms a step and 0.1 ms a token; blocks for about six of these requests.
SMALL = Profile(
    name="small",
    costs=MeasuredCosts(
        table=((0, 10 * MS), (1000, 110 * MS)),
        ns_per_context=0.0,
        ns_per_pair=0.0,
        ns_per_row=0,
        ns_per_copy=0,
    ),
    engine=EngineConfig(
        num_blocks=48,
        num_host_blocks=16,
        max_sequences=8,
        step_tokens=64,
        chunk_tokens=64,
        context_limit=512,
        eos_token_ids=(0,),
    ),
)
SHAPE = Workload(
    name="small",
    prompt=Lengths(median=48, sigma=0.6, low=8, high=160),
    output=Lengths(median=24, sigma=0.6, low=2, high=80),
    prefix=16,
    prefix_groups=3,
)


def run(plan: Plan, *, count: int = 60, rate: float = 8.0, seed: str = "0") -> Outcome:
    requests = generate(SHAPE, count=count, seed=seed, arrivals=Arrivals(rate_per_s=rate))
    simulation = Simulation(plan, requests)
    outcome = simulation.run()
    simulation.check()
    for replica in simulation.fleet.replicas.values():
        assert replica.idle
        assert replica.engine.snapshot("", 0).blocks_free == SMALL.engine.num_blocks, "a leak"
    return outcome


def one(request_id: str, *, arrival: int = 0, prompt: int = 32, output: int = 8) -> Request:
    return Request(
        request_id=request_id,
        prompt=tuple(range(1000, 1000 + prompt)),
        sampling=SamplingParams(max_tokens=output, temperature=0.0),
        arrival=arrival,
    )


def test_events_of_one_moment_keep_their_order() -> None:
    clock, seen = Clock(), list[str]()
    clock.at(5, seen.append, "b")
    clock.at(3, seen.append, "a")
    clock.at(5, seen.append, "c")
    while clock.next_at() is not None:
        clock.step()
    assert (seen, clock.now) == (["a", "b", "c"], 5)


def test_one_request_takes_what_its_steps_take() -> None:
    """Prompt 32 -> a step of 13.2 ms and 7 of 10.1 ms; a link of 1 ms each way."""
    plan = Plan(profile=SMALL, replicas=1, network=Network(link_ns=MS))
    request = one("a", arrival=NS_PER_S)
    (found,) = Simulation(plan, [request]).run().timelines
    assert found.queued_ns == 0
    assert found.ttft_ns == round((1 + 13.2 + 1) * MS)
    assert found.last is not None and found.first is not None
    assert found.last - found.first == round(7 * 10.1 * MS)
    assert (found.tokens, found.finish) == (8, Finish.LENGTH)


def test_an_output_ends_where_its_client_says() -> None:
    arrivals = [
        Arrival(request=one("a", output=50), output=5),
        Arrival(request=one("b", output=50), output=70),
    ]
    a, b = Simulation(Plan(profile=SMALL), arrivals).run().timelines
    assert (a.tokens, a.finish) == (5, Finish.STOP)
    assert (b.tokens, b.finish) == (50, Finish.LENGTH)


@pytest.mark.parametrize("dispatchers", [1, 3])
def test_the_same_run_twice_is_the_same(dispatchers: int) -> None:
    plan = Plan(profile=SMALL, replicas=3, dispatchers=dispatchers)
    first, second = run(plan), run(plan)
    assert first.timelines == second.timelines
    assert first.samples == second.samples
    assert first.events == second.events
    assert run(plan, seed="1").timelines != first.timelines


@pytest.mark.parametrize(
    "network",
    [
        Network(),
        Network(link_ns=20 * MS, snapshot_period_ns=500 * MS, snapshot_delay_ns=300 * MS),
    ],
    ids=["fresh", "stale"],
)
@pytest.mark.parametrize("rate", [4.0, 40.0])
def test_every_request_is_answered_and_every_machine_holds(network: Network, rate: float) -> None:
    plan = Plan(profile=SMALL, replicas=2, dispatchers=2, network=network, check_every=7)
    outcome = run(plan, rate=rate)
    assert [one.finish for one in outcome.timelines] == [Finish.LENGTH] * 60
    assert all(one.tokens == one.request.sampling.max_tokens for one in outcome.timelines)
    for one in outcome.timelines:
        times = (one.request.arrival, one.arrived, one.routed, one.first, one.last)
        assert list(times) == sorted(times)  # type: ignore[type-var]


def test_pressure_preempts_and_is_recorded() -> None:
    tight = replace(SMALL, engine=replace(SMALL.engine, num_blocks=20, num_host_blocks=0))
    requests = generate(SHAPE, count=40, seed="0", arrivals=Arrivals(rate_per_s=40.0))
    simulation = Simulation(Plan(profile=tight), requests)
    outcome = simulation.run()
    (replica,) = simulation.fleet.replicas.values()
    counted = replica.engine.snapshot("", 0).preemptions_total
    assert counted > 0
    assert sum(one.preemptions for one in outcome.timelines) == counted


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    plan = Plan(profile=SMALL, admission=AdmissionConfig(max_queued_requests=3))
    outcome = run(plan, rate=200.0)
    refused = [one for one in outcome.timelines if one.refusal]
    assert 0 < len(refused) < 60
    assert all(one.retry_after_s and one.retry_after_s >= 1 for one in refused)
    assert all(one.finish is None for one in refused)


def test_a_client_that_leaves_frees_what_it_had() -> None:
    arrivals = [
        Arrival(request=one(f"q{i}", arrival=i * MS, output=200), leaves_ns=(50 + 40 * i) * MS)
        for i in range(12)
    ]
    simulation = Simulation(Plan(profile=SMALL, check_every=1), arrivals)
    outcome = simulation.run(until_ns=3 * NS_PER_S)
    assert [one.refusal for one in outcome.timelines] == ["the client left"] * 12
    (replica,) = simulation.fleet.replicas.values()
    assert replica.idle
    assert replica.engine.snapshot("", 0).blocks_free == SMALL.engine.num_blocks


def test_replicas_start_late_and_drain_before_they_go() -> None:
    plan = Plan(profile=SMALL, replicas=1, cold_start_ns=2 * NS_PER_S, check_every=3)
    requests = generate(SHAPE, count=80, seed="0", arrivals=Arrivals(rate_per_s=10.0))
    simulation = Simulation(plan, requests)
    simulation.clock.at(1 * NS_PER_S, simulation.fleet.scale_to, 3)
    simulation.clock.at(5 * NS_PER_S, simulation.fleet.scale_to, 1)
    outcome = simulation.run()
    assert {one.finish for one in outcome.timelines} == {Finish.LENGTH}
    ready = [sample.ready for sample in outcome.samples]
    assert (ready[2], ready[4]) == (1, 3)
    assert ready[-1] == 1
    used = {one.replica for one in outcome.timelines}
    assert used == {"r000", "r001", "r002"}
    alive_s = sum(
        (one.removed or outcome.ended) - one.ordered for one in simulation.fleet.replicas.values()
    )
    assert outcome.replica_ns == alive_s < 3 * outcome.ended


def test_a_planted_leak_is_seen() -> None:
    plan = Plan(profile=SMALL, check_every=1)
    simulation = Simulation(plan, [one("a"), one("b", arrival=20 * MS)])

    def leak() -> None:
        (replica,) = simulation.fleet.replicas.values()
        replica.engine._scheduler.pool.allocate(1)

    simulation.clock.at(15 * MS, leak)
    with pytest.raises(AssertionError):
        simulation.run()


def test_a_lost_request_is_seen() -> None:
    plan = Plan(profile=SMALL, check_every=1)
    simulation = Simulation(plan, [one("a"), one("b", arrival=20 * MS)])
    (dispatcher,) = simulation.dispatchers
    simulation.clock.at(15 * MS, dispatcher._open.clear)
    with pytest.raises(AssertionError, match="nowhere"):
        simulation.run()


def test_the_roofline_knows_what_bounds_a_step() -> None:
    costs = profile("H100:llama-8b").costs
    decode = StepShape(rows=1, tokens=1, context=1, pairs=0, copies=0)
    few = StepShape(rows=32, tokens=32, context=32, pairs=0, copies=0)
    prefill = StepShape(rows=1, tokens=2048, context=2048, pairs=2048 * 1024, copies=0)
    long = StepShape(rows=32, tokens=32, context=32 * 8192, pairs=0, copies=0)
    # 16 GB at 70 % of 3.35 TB/s: 6.85 ms, and 4 of overhead, whether 1 token or 32.
    assert costs.step_ns(decode) == pytest.approx(10.85e6, rel=0.01)
    assert costs.step_ns(few) == pytest.approx(costs.step_ns(decode), rel=0.01)
    # 2 × 8e9 × 2048 FLOP at 70 % of 989 TFLOP/s: 47.5 ms.
    assert costs.step_ns(prefill) == pytest.approx(51.5e6, rel=0.05)
    assert costs.step_ns(long) > 2 * costs.step_ns(few)
    with pytest.raises(ValueError, match="does not fit"):
        profile("L4:llama-70b")
    with pytest.raises(ValueError, match="demo-cpu"):
        profile("H100")


def test_a_table_is_linear_between_its_rows_and_beyond() -> None:
    costs = DEMO_CPU.costs
    assert isinstance(costs, MeasuredCosts)
    for tokens, step_ns in costs.table:
        assert costs._linears(tokens) == step_ns
    assert costs._linears(costs.table[-1][0] * 2) > costs.table[-1][1]


QUICK = [one for one in SCENARIOS if not one.slow]
SLOW = [one for one in SCENARIOS if one.slow]


@pytest.mark.parametrize("chosen", QUICK, ids=[one.name for one in QUICK])
def test_a_scenario_meets_its_targets(chosen: Scenario) -> None:
    result = chosen.run("0")
    assert result.met, result.render()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chosen", SLOW, ids=[one.name for one in SLOW])
def test_a_slow_scenario_meets_its_targets(chosen: Scenario) -> None:
    result = chosen.run("0")
    assert result.met, result.render()


def test_steps_at_once_change_nothing_where_nobody_waits_for_news() -> None:
    """One replica: whatever comes is routed there, however old its news. Each request's first and
    last token, to the nanosecond, and the replica's own numbers."""
    plan = Plan(profile=profile("H100:llama-8b"), replicas=1)
    found = []
    for news_ns in (None, 100 * NS_PER_MS):
        requests = generate(
            workload("mixed"), count=40, seed="once", arrivals=Arrivals(rate_per_s=4.0)
        )
        simulation = Simulation(replace(plan, news_ns=news_ns), requests)
        outcome = simulation.run()
        simulation.check()
        (replica,) = simulation.fleet.replicas.values()
        said = [(one.first, one.last, one.tokens, one.finish) for one in outcome.timelines]
        found.append((said, replica.engine.snapshot("r", 0), replica.worker.steps_by_ms))
        events = outcome.events
    assert found[0] == found[1]
    assert events < found[1][1].steps_total, "hardly anything was done at once"
