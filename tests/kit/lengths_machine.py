"""`Lengths` against lists of all that was observed."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fabric.core.request import Request, SamplingParams
from fabric.core.traffic import lengths as lengths_module
from fabric.core.traffic.lengths import LEVEL, STEP, Lengths

# Small enough to be reached: outputs before a node answers, outputs it remembers, nodes.
ENOUGH, MEMORY, MAX_NODES = 3, 16, 7
# Upper edges of buckets: exact, then each 10 % wider, whole tokens.
EDGES = (*range(1, 17), *(int(16 * 1.1**k + 1e-6) for k in range(1, 80)))

tenants = st.sampled_from(["", "a", "b"])
prompts = st.sampled_from([1, 2, 3, 9])
limits = st.sampled_from([4, 7, 1000])


@dataclass(slots=True)
class Seen:
    """What one node should know. `outputs`: bucket edges, as often as they count."""

    outputs: list[int] = field(default_factory=list)
    total: int = 0
    level: float = LEVEL

    def high(self, most: int) -> int:
        """The smallest edge below which the share `level` lies."""
        ordered = sorted(self.outputs)
        wanted = self.level * len(ordered)
        held = [edge for at, edge in enumerate(ordered, start=1) if at >= wanted]
        return min(most, held[0] if held else ordered[-1])

    def add(self, tokens: int) -> None:
        """One output more; every second one of each bucket is forgotten when they are too many."""
        self.outputs.append(next(edge for edge in EDGES if edge >= tokens))
        self.total += tokens
        if len(self.outputs) > MEMORY:
            counts = {edge: self.outputs.count(edge) // 2 for edge in self.outputs}
            kept = [edge for edge, count in counts.items() for _ in range(count)]
            self.total = self.total * len(kept) // len(self.outputs)
            self.outputs = kept


class LengthsMachine(RuleBasedStateMachine):
    """Requests of few kinds end; every estimate is worked out anew from what was seen."""

    @initialize()
    def build(self) -> None:
        self.before = {name: getattr(lengths_module, name) for name in self.small()}
        for name, value in self.small().items():
            setattr(lengths_module, name, value)
        self.lengths = Lengths()
        self.nodes: dict[tuple[object, ...], Seen] = {(): Seen()}  # the longest unused first

    @staticmethod
    def small() -> dict[str, int]:
        """The module's constants meanwhile."""
        return {"ENOUGH": ENOUGH, "MEMORY": MEMORY, "MAX_NODES": MAX_NODES}

    def teardown(self) -> None:
        for name, value in getattr(self, "before", {}).items():
            setattr(lengths_module, name, value)

    @rule(
        tenant=tenants,
        prompt=prompts,
        most=limits,
        tokens=st.integers(1, 4) | st.integers(1, 900),
        times=st.integers(1, 8),
    )
    def ends(self, tenant: str, prompt: int, most: int, tokens: int, times: int) -> None:
        """So many like it, each after as many tokens."""
        request, tokens = self.ask(tenant, prompt, most), min(tokens, most)
        for _ in range(times):
            self.lengths.observe(request, tokens)
            for key in self.keys(request):
                node = self.nodes.pop(key, None) or Seen()
                self.nodes[key] = node
                if len(node.outputs) >= ENOUGH:
                    missed = tokens > node.high(most)
                    node.level += STEP * (LEVEL - (0.0 if missed else 1.0))
                    node.level = min(1.0, max(0.0, node.level))
                node.add(tokens)
            for key in list(self.nodes)[: max(0, len(self.nodes) - MAX_NODES)]:
                del self.nodes[key]

    @rule(tenant=tenants, prompt=prompts, most=limits)
    def is_asked(self, tenant: str, prompt: int, most: int) -> None:
        request = self.ask(tenant, prompt, most)
        found = self.lengths.estimate(request)
        assert 1 <= found.likely <= most, "the mean"
        for depth, key in enumerate(self.keys(request)):
            node = self.nodes.get(key)
            if node is None or len(node.outputs) < ENOUGH:
                continue
            assert found.depth == depth, "a finer node knows enough, or this one does not"
            assert found.high == node.high(most), "the quantile"
            mean = node.total / len(node.outputs)
            assert abs(found.likely - min(most, max(1.0, mean))) <= 0.5, "the mean"
            return
        assert (found.likely, found.high, found.depth) == (max(1, most // 2), most, 4)

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "lengths"):
            return
        self.lengths.check()
        assert list(self.lengths._nodes) == list(self.nodes), "who is forgotten, and who is not"

    @staticmethod
    def ask(tenant: str, prompt: int, most: int) -> Request:
        sampling = SamplingParams(max_tokens=most)
        return Request(
            request_id="r", prompt=(1,) * prompt, sampling=sampling, arrival=0, tenant=tenant
        )

    @staticmethod
    def keys(request: Request) -> list[tuple[object, ...]]:
        """From fine to coarse: powers of two stand for the numbers below them."""
        bits = len(request.prompt).bit_length(), request.sampling.max_tokens.bit_length()
        model = request.model_version, request.adapter
        return [(request.tenant, *model, *bits), (*model, *bits), model, ()]
