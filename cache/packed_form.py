"""How an adapter lies in one buffer: offsets by arithmetic alone, before a byte is allocated.

Site after site: the A blocks of its targets stacked as one [sum of ranks, in_local], then each
target's B, stored transposed as [rank, out_local]. Ranks are true ranks, never padded. After the
sites come the adapter's parts, tensors of any shape that are found by name. Every block starts at
a multiple of ALIGNMENT bytes, and the whole is a multiple of it.

On the device the buffer may be cut between blocks, and so lie in several extents: each has an
offset of its own in the rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import NamedTuple

from lorafleet.cache.layout import MAX_SITE_TARGETS, LoraSite, ModelLayout

ALIGNMENT = 256  # bytes

# [a_offset, rank_total, rank_0, b_offset_0, rank_1, b_offset_1, rank_2, b_offset_2] in elements;
# what is not there has rank 0 and offset 0.
SiteRow = tuple[int, int, int, int, int, int, int, int]
ROW_WIDTH = 2 + 2 * MAX_SITE_TARGETS
EMPTY_ROW: SiteRow = (0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Part:
    """A named tensor in the buffer; `offset` in elements."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the tensor, without what alignment adds."""
        return prod(self.shape)


class Run(NamedTuple):
    """Elements [start, stop) of the buffer, which lie at element `offset` of an arena."""

    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a buffer lies in an arena: its runs, and rows and parts with the arena's offsets."""

    runs: tuple[Run, ...]
    rows: tuple[SiteRow, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class PackedForm:
    """The buffer's size, one row per site, and the parts; offsets count from the buffer's start."""

    rows: tuple[SiteRow, ...]
    num_elements: int
    itemsize: int
    parts: tuple[Part, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, a multiple of ALIGNMENT."""
        return self.num_elements * self.itemsize

    @property
    def piece_bytes(self) -> int:
        """Bytes of the largest block."""
        bounds = pairwise(self._bounds())
        return max((stop - start for start, stop in bounds), default=0) * self.itemsize

    def place(self, extents: Iterable[tuple[int, int]]) -> Placement:
        """Lays the blocks into extents of an arena (offset and length, in elements).

        Each extent takes blocks in order until one does not fit. Raises ValueError if some are
        left over.
        """
        runs = tuple(_runs(self._bounds(), extents))
        starts = [run.start for run in runs]

        def shift(offset: int) -> int:
            run = runs[bisect_right(starts, offset) - 1]
            return run.offset - run.start

        return Placement(
            runs,
            tuple(_shifted(row, shift) for row in self.rows),
            tuple(replace(part, offset=part.offset + shift(part.offset)) for part in self.parts),
        )

    def _bounds(self) -> list[int]:
        """Where blocks begin, and the end."""
        starts = []
        for row in self.rows:
            if row[1]:
                ranks = zip(row[2::2], row[3::2], strict=True)
                starts += [row[0], *(offset for rank, offset in ranks if rank)]
        return [*starts, *(part.offset for part in self.parts), self.num_elements]


def plan_form(
    ranks: Mapping[str, int],
    layout: ModelLayout,
    itemsize: int,
    parts: Mapping[str, tuple[int, ...]] | None = None,
) -> PackedForm:
    """Lays out modules of the given ranks, by full name, for one rank's part of the model.

    `parts`: the shapes of the parts this rank holds, by name.
    """
    rows, cursor = [], 0
    for site in layout.sites:
        row, cursor = _plan_site(site, ranks, cursor, ALIGNMENT // itemsize)
        rows.append(row)
    placed = []
    for name, shape in (parts or {}).items():
        placed.append(Part(name, cursor, shape))
        cursor = _align(cursor + placed[-1].num_elements, ALIGNMENT // itemsize)
    return PackedForm(tuple(rows), cursor, itemsize, tuple(placed))


def _plan_site(
    site: LoraSite, ranks: Mapping[str, int], cursor: int, unit: int
) -> tuple[SiteRow, int]:
    site_ranks = [ranks.get(target.name, 0) for target in site.targets]
    if not any(site_ranks):
        return EMPTY_ROW, cursor
    fields = [cursor, sum(site_ranks)]
    cursor = _align(cursor + sum(site_ranks) * site.in_local, unit)
    for target, rank in zip(site.targets, site_ranks, strict=True):
        fields += [rank, cursor if rank else 0]
        cursor = _align(cursor + rank * target.out_local, unit)
    return _as_row(fields), cursor


def _runs(bounds: list[int], extents: Iterable[tuple[int, int]]) -> Iterator[Run]:
    places, offset, room = iter(extents), 0, 0
    run_start = bounds[0]
    for start, stop in pairwise(bounds):
        while stop - start > room:
            if start > run_start:
                yield Run(run_start, start, offset)
            run_start = start
            place = next(places, None)
            if place is None:
                raise ValueError("the extents are too short for the blocks")
            offset, room = place
        room -= stop - start
    if bounds[-1] > run_start:
        yield Run(run_start, bounds[-1], offset)


def _align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _shifted(row: SiteRow, shift: Callable[[int], int]) -> SiteRow:
    a, total, *pairs = row
    if not total:
        return EMPTY_ROW
    fields = [a + shift(a), total]
    for rank, b in zip(pairs[::2], pairs[1::2], strict=True):
        fields += [rank, b + shift(b) if rank else 0]
    return _as_row(fields)


def _as_row(fields: list[int]) -> SiteRow:
    a, total, r0, b0, r1, b1, r2, b2 = fields + [0] * (ROW_WIDTH - len(fields))
    return a, total, r0, b0, r1, b1, r2, b2
