"""`StopSearch` against a naive one: a text in pieces, and where its first stop string is."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fabric.gateway.stops import StopAutomaton, StopSearch

# Few letters, so that stops overlap, contain each other and nearly come.
LETTERS = "abé👩"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4)


def naive_stop(text: str, stops: list[str]) -> str | None:
    """What comes before the stop that is complete first (of those, the longest)."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))]
    return None


class StopMachine(RuleBasedStateMachine):
    """Two choices of one request: they share the automaton and nothing else."""

    @initialize(stops=STOPS)
    def build(self, stops: list[str]) -> None:
        self.stops = stops
        automaton = StopAutomaton(tuple(stops))
        self.searches = [StopSearch(automaton), StopSearch(automaton)]
        self.texts, self.shown = ["", ""], ["", ""]
        self.over = [False, False]

    @rule(first=st.booleans(), part=st.text(LETTERS, max_size=5))
    def push(self, first: bool, part: str) -> None:
        self.come(self.which(first), part)

    @rule(
        first=st.booleans(), stop=st.integers(0, 3), cut=st.integers(0, 4), left_out=st.booleans()
    )
    def push_nearly(self, first: bool, stop: int, cut: int, left_out: bool) -> None:
        """A stop string in two pieces, perhaps without its last letter."""
        word = self.stops[stop % len(self.stops)]
        word = word[:-1] if left_out else word
        for part in (word[:cut], word[cut:]):
            self.come(self.which(first), part)

    @rule(first=st.booleans())
    def flush(self, first: bool) -> None:
        """The text is over without a stop."""
        which = self.which(first)
        if self.over[which]:
            return
        self.shown[which] += self.searches[which].flush()
        assert self.shown[which] == self.texts[which], "something was kept"
        self.over[which] = True

    def come(self, which: int, part: str) -> None:
        if self.over[which]:
            return
        search = self.searches[which]
        self.texts[which] += part
        self.shown[which] += search.push(part)
        self.over[which] = search.found is not None

    def which(self, first: bool) -> int:
        return int(not first) if not self.over[int(not first)] else int(first)

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "texts"):
            return
        for text, shown, search, over in zip(
            self.texts, self.shown, self.searches, self.over, strict=True
        ):
            assert text.startswith(shown), "what was shown stays"
            expected = naive_stop(text, self.stops)
            assert (search.found is None) == (expected is None), "a stop was missed, or made up"
            if expected is not None:
                assert shown == expected, "what comes before it"
                assert text.startswith(shown + str(search.found)), "which one it was"
                continue
            held = text[len(shown) :]
            assert not held or any(one.startswith(held) for one in self.stops), "held for nothing"
            begun = [one[:size] for one in self.stops for size in range(1, len(one))]
            most = max((len(one) for one in begun if text.endswith(one)), default=0)
            assert over or len(held) == most, "shown too early"
