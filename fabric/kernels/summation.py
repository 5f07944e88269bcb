"""`ChunkedSum`: one order of adding for a product whose inputs lie on several workers.

Adding floats in another order gives other bits. So a row-parallel product is cut into chunks of
inputs; each chunk's products are added from zero in float32, and the chunk sums as a binary tree
that halves the chunks: the same for any number of workers, one included. A worker holds a run of
chunks and adds up the subtrees that lie in it, its pieces; the group adds the pieces.

    chunks       0   1   2   3   4   5
    tree       ((0 + (1 + 2)) + (3 + (4 + 5)))
    2 workers   [         ]   [         ]       one piece each
    3 workers   [     ] [     ] [     ]         pieces 0, 1 | 2, 3 | 4 + 5
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedSum:
    """`sizes`: inputs of each chunk of the whole matrix. `runs`: the chunks that each worker of the
    group holds, in the order of ranks, together all of them (alone: one run)."""

    sizes: tuple[int, ...]
    runs: tuple[range, ...]

    def __post_init__(self) -> None:
        if not self.sizes or [c for run in self.runs for c in run] != list(range(len(self.sizes))):
            raise ValueError(f"the runs {self.runs} don't share out {len(self.sizes)} chunks")

    def inputs(self, rank: int) -> range:
        """The inputs of the whole matrix that a rank holds."""
        run = self.runs[rank]
        return range(sum(self.sizes[: run.start]), sum(self.sizes[: run.stop]))

    def pieces(self, rank: int) -> tuple[range, ...]:
        """The largest subtrees within a rank's run."""
        run = self.runs[rank]

        def within(tree: range) -> tuple[range, ...]:
            if tree.start >= run.stop or tree.stop <= run.start:
                return ()
            if run.start <= tree.start and tree.stop <= run.stop:
                return (tree,)
            low, high = _halves(tree)
            return within(low) + within(high)

        return within(range(len(self.sizes)))

    def chunk_merges(self, rank: int) -> tuple[int, ...]:
        """For each chunk of a rank's run: how many times, once it is pushed on a stack of sums,
        the two on top become one. What remains are the pieces."""
        return _merges(self.pieces(rank), [range(c, c + 1) for c in self.runs[rank]])

    def piece_merges(self) -> tuple[int, ...]:
        """The same for the pieces of all ranks, in order; what remains is the sum."""
        pieces = [piece for rank in range(len(self.runs)) for piece in self.pieces(rank)]
        return _merges((range(len(self.sizes)),), pieces)


def _halves(tree: range) -> tuple[range, range]:
    middle = (tree.start + tree.stop) // 2
    return range(tree.start, middle), range(middle, tree.stop)


def _merges(trees: tuple[range, ...], leaves: list[range]) -> tuple[int, ...]:
    """How many subtrees of `trees` are complete with each of `leaves`."""
    found: dict[int, int] = dict.fromkeys((leaf.stop for leaf in leaves), 0)
    known = set(leaves)

    def visit(tree: range) -> None:
        if tree in known:
            return
        low, high = _halves(tree)
        visit(low)
        visit(high)
        found[tree.stop] += 1

    for tree in trees:
        visit(tree)
    return tuple(found.values())
