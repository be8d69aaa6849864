"""ExtentLedger: which byte intervals of an arena are free."""

from __future__ import annotations

from bisect import insort


class ExtentLedger:
    """First-fit allocation in [0, nbytes); offsets and sizes are multiples of `alignment`."""

    def __init__(self, nbytes: int, alignment: int) -> None:
        self.alignment = alignment
        self.capacity = nbytes // alignment * alignment
        self._free = [(0, self.capacity)] if self.capacity else []  # (start, stop), ascending

    def rounded(self, nbytes: int) -> int:
        """The bytes an allocation of `nbytes` takes."""
        return max(1, -(-nbytes // self.alignment)) * self.alignment

    def fits(self, nbytes: int) -> bool:
        """Whether some free interval holds `nbytes`."""
        size = self.rounded(nbytes)
        return any(stop - start >= size for start, stop in self._free)

    def take(self, nbytes: int) -> int | None:
        """The offset of a newly taken interval, None if no free one is long enough."""
        size = self.rounded(nbytes)
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                rest = [(start + size, stop)] if stop - start > size else []
                self._free[index : index + 1] = rest
                return start
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """Frees what `take(nbytes)` returned."""
        freed = (offset, offset + self.rounded(nbytes))
        insort(self._free, freed)
        index = self._free.index(freed)
        for left in (index, index - 1):  # join with the right neighbour, then with the left
            if 0 <= left < len(self._free) - 1 and self._free[left][1] == self._free[left + 1][0]:
                joined = (self._free[left][0], self._free[left + 1][1])
                self._free[left : left + 2] = [joined]

    def copy(self) -> ExtentLedger:
        """An independent copy, to try things on."""
        twin = ExtentLedger(self.capacity, self.alignment)
        twin._free = list(self._free)
        return twin

    def check(self, taken: list[tuple[int, int]]) -> None:
        """Asserts that the (offset, nbytes) in `taken` and the free intervals tile the arena."""
        pieces = sorted([*self._free, *((at, at + self.rounded(size)) for at, size in taken)])
        end = 0
        for start, stop in pieces:
            assert start == end, f"arena bytes {start} and {end} should meet"
            end = stop
        assert end == self.capacity, "arena bytes are lost at the end"
