"""ExtentLedger: which byte intervals of an arena are free."""

from __future__ import annotations

from bisect import insort

Extent = tuple[int, int]  # offset and bytes


class ExtentLedger:
    """Allocation in [0, capacity) in as few extents as it takes; all are multiples of `alignment`.

    What is allocated is a row of pieces, the longest of `piece` bytes, that may be cut between
    pieces only. Whoever fills the extents puts the pieces into each, in order, until one does not
    fit. So an extent that is not the last wastes less than a piece, and nobody needs to know the
    single pieces here.
    """

    def __init__(self, nbytes: int, alignment: int) -> None:
        self.alignment = alignment
        self.capacity = nbytes // alignment * alignment
        self._free = [(0, self.capacity)] if self.capacity else []  # (start, stop), ascending

    def rounded(self, nbytes: int) -> int:
        """The bytes an allocation of `nbytes` takes in one extent."""
        return max(1, -(-nbytes // self.alignment)) * self.alignment

    def fits(self, nbytes: int, piece: int) -> bool:
        """Whether `take` would find a place."""
        return self.rounded(nbytes) <= self.room([b - a for a, b in self._free], piece)

    def room(self, lengths: list[int], piece: int) -> int:
        """The most bytes that are sure to fit into free intervals of these lengths."""
        loss = self.rounded(piece) - self.alignment
        useful = [length - loss for length in lengths if length > loss]
        return sum(useful) + loss if useful else max(lengths, default=0)

    def take(self, nbytes: int, piece: int) -> tuple[Extent, ...] | None:
        """Newly taken extents, to be filled in this order; None if there is no place.

        One, the first that is long enough, if there is one; else the longest, as many as needed.
        """
        size = self.rounded(nbytes)
        for start, stop in self._free:
            if stop - start >= size:
                return (self._cut(start, size),)
        if not self.fits(nbytes, piece):
            return None
        loss = self.rounded(piece) - self.alignment
        extents = []
        while not self._has(size):
            start, stop = max(self._free, key=lambda free: free[1] - free[0])
            extents.append(self._cut(start, stop - start))
            size -= stop - start - loss
        start, stop = min(
            (free for free in self._free if free[1] - free[0] >= size),
            key=lambda free: free[1] - free[0],
        )
        return (*extents, self._cut(start, size))

    def give(self, extents: tuple[Extent, ...]) -> None:
        """Frees what `take` returned."""
        for offset, nbytes in extents:
            self._give(offset, nbytes)

    def copy(self) -> ExtentLedger:
        """An independent copy, to try things on."""
        twin = ExtentLedger(self.capacity, self.alignment)
        twin._free = list(self._free)
        return twin

    def check(self, taken: list[Extent]) -> None:
        """Asserts that the extents in `taken` and the free intervals tile the arena."""
        pieces = sorted([*self._free, *((at, at + size) for at, size in taken)])
        end = 0
        for start, stop in pieces:
            assert start == end, f"arena bytes {start} and {end} should meet"
            end = stop
        assert end == self.capacity, "arena bytes are lost at the end"

    def _has(self, size: int) -> bool:
        return any(stop - start >= size for start, stop in self._free)

    def _cut(self, start: int, size: int) -> Extent:
        index = next(i for i, free in enumerate(self._free) if free[0] == start)
        stop = self._free[index][1]
        self._free[index : index + 1] = [(start + size, stop)] if stop - start > size else []
        return start, size

    def _give(self, offset: int, nbytes: int) -> None:
        freed = (offset, offset + nbytes)
        insort(self._free, freed)
        index = self._free.index(freed)
        for left in (index, index - 1):  # join with the right neighbour, then with the left
            if 0 <= left < len(self._free) - 1 and self._free[left][1] == self._free[left + 1][0]:
                joined = (self._free[left][0], self._free[left + 1][1])
                self._free[left : left + 2] = [joined]
