"""Who may have killed a replica, and how that is found out without punishing who stood beside.

    sent ──> unproven ── a token ──> proven: it is not to blame for anything before
                │ the replica dies
                ├── it was there when earlier ones died, too, and nobody else there
                │   was unproven   ──> guilty
                └── else: under suspicion; one such request a replica at a time goes on,
                    and nothing new goes there until it has proven itself

With continuous batching every request is in every step, so being in the step in which a replica
died says little. But whoever was resumed and has drawn one more token has passed the place where it
was; a request that kills does not get there. Proving costs one pass over its own tokens, which
resuming costs anyway. So a request that kills is refused after two replicas (three that die without
a word), and one that was merely beside it, however often, never is.
"""

from __future__ import annotations

from collections.abc import Collection

# Deaths of replicas by which a request is found guilty: where the replica said which step broke
# it, and where it died without a word. That may have been somebody from outside, so once is no
# proof of anything.
DEATHS_TOLD = 2
DEATHS_UNTOLD = 3


class Quarantine:
    """Over all requests of one dispatcher that are on a replica, or on their way to another."""

    __slots__ = ("_deaths", "_on", "_unproven", "guilty")

    def __init__(self) -> None:
        self._on: dict[str, str] = {}  # request -> replica
        self._unproven: dict[str, str] = {}  # of those: without a token since they were sent there
        self._deaths: dict[str, int] = {}  # replicas that died under it since its last token
        self.guilty: set[str] = set()

    def sent(self, request_id: str, replica_id: str) -> None:
        """It goes to a replica."""
        self._on[request_id] = replica_id
        self._unproven[request_id] = replica_id

    def proven(self, request_id: str) -> bool:
        """It has drawn a token there. True: it was under suspicion until now."""
        if self._unproven.pop(request_id, None) is None:
            return False
        return self._deaths.pop(request_id, None) is not None

    def died(self, replica_id: str, at_work: Collection[str] | None = None) -> tuple[str, ...]:
        """The replica is lost; who is found guilty by it. `at_work`: who was in the step that
        ended it, if that is known. Saying it twice is saying it once."""
        there = [name for name, where in self._on.items() if where == replica_id]
        involved = [name for name in there if at_work is None or name in at_work]
        unproven = [name for name in involved if name in self._unproven]
        for name in involved:
            self._deaths[name] = min(self._deaths.get(name, 0) + 1, DEATHS_UNTOLD)
        for name in there:
            self.left(name)
        enough = DEATHS_UNTOLD if at_work is None else DEATHS_TOLD
        alone = len(unproven) == 1
        found = tuple(unproven) if alone and self._is_deadly(unproven[0], enough) else ()
        self.guilty.update(found)
        return found

    def left(self, request_id: str) -> None:
        """It is not on that replica any more; suspicion stays."""
        self._on.pop(request_id, None)
        self._unproven.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """It is over."""
        self.left(request_id)
        self._deaths.pop(request_id, None)
        self.guilty.discard(request_id)

    def tests(self, replica_id: str) -> bool:
        """Somebody under suspicion has to prove himself there: nothing new may join him."""
        return any(
            where == replica_id and name in self._deaths for name, where in self._unproven.items()
        )

    def check(self) -> None:
        """Its own lists fit together."""
        assert self._unproven.items() <= self._on.items(), "unproven where it is not"
        assert all(1 <= deaths <= DEATHS_UNTOLD for deaths in self._deaths.values()), "deaths"
        proven = self._on.keys() - self._unproven.keys()
        assert not proven & self._deaths.keys(), "proven, and under suspicion"
        for replica_id in dict.fromkeys(self._unproven.values()):
            suspects = [
                name
                for name, where in self._unproven.items()
                if where == replica_id and name in self._deaths
            ]
            assert len(suspects) <= 1, "two prove themselves at once"

    def _is_deadly(self, request_id: str, enough: int) -> bool:
        return self._deaths.get(request_id, 0) >= enough
