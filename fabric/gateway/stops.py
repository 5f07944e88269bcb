"""Finding stop strings in a text that comes in pieces (Aho-Corasick, CACM 18(6), 1975).

The automaton's state is the longest end of the text so far that begins some stop string. Just that
many characters are held back: they may turn out to be a stop; everything before can't. Each
character costs O(1) amortised, and where the text is cut into tokens makes no difference.
"""

from __future__ import annotations

from collections import deque


class StopAutomaton:
    """The stop strings, compiled; shared by all choices of a request."""

    __slots__ = ("depth", "fail", "go", "match")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.go: list[dict[str, int]] = [{}]  # state -> character -> state
        self.depth = [0]  # characters that lead to the state
        self.match: list[str | None] = [None]  # the longest stop that ends in the state
        for stop in stops:
            self._insert(stop)
        self.fail = [0] * len(self.go)  # the longest proper end of the state that is a state too
        self._link()

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self.go[state].get(character)
            if following is None:
                following = len(self.go)
                self.go.append({})
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
                self.go[state][character] = following
            state = following
        self.match[state] = stop

    def _link(self) -> None:
        waiting = deque(self.go[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self.go[state].items():
                waiting.append(following)
                back = self.fail[state]
                while back and character not in self.go[back]:
                    back = self.fail[back]
                self.fail[following] = self.go[back].get(character, 0)
                if self.match[following] is None:
                    self.match[following] = self.match[self.fail[following]]


class StopSearch:
    """One choice's search. `found` names the stop string once it was met."""

    __slots__ = ("_automaton", "_held", "_state", "found")

    def __init__(self, automaton: StopAutomaton) -> None:
        self._automaton = automaton
        self._state = 0
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take the next text; gives what can be shown now. After a stop: what came before it."""
        automaton, state = self._automaton, self._state
        go, fail, match = automaton.go, automaton.fail, automaton.match
        for index, character in enumerate(text):
            while state and character not in go[state]:
                state = fail[state]
            state = go[state].get(character, 0)
            stop = match[state]
            if stop is not None:
                self.found = stop
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen[: len(seen) - len(stop)]
        seen = self._held + text
        self._state = state
        shown = len(seen) - automaton.depth[state]
        self._held = seen[shown:]
        return seen[:shown]

    def flush(self) -> str:
        """The text is over: what was held back is no stop after all."""
        held, self._held, self._state = self._held, "", 0
        return held
