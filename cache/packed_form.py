"""How an adapter lies in one buffer: offsets by arithmetic alone, before a byte is allocated.

Site after site: the A blocks of its targets stacked as one [sum of ranks, in_local], then each
target's B, stored transposed as [rank, out_local]. Ranks are true ranks, never padded. After the
sites come the adapter's parts, tensors of any shape that are found by name. Every block starts at
a multiple of ALIGNMENT bytes, and the whole is a multiple of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

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

    def rows_at(self, offset: int) -> tuple[SiteRow, ...]:
        """The rows with the buffer lying at element `offset` of an arena."""
        return tuple(_shifted(row, offset) for row in self.rows)

    def parts_at(self, offset: int) -> tuple[Part, ...]:
        """The parts with the buffer lying at element `offset` of an arena."""
        return tuple(replace(part, offset=part.offset + offset) for part in self.parts)


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


def _align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _shifted(row: SiteRow, offset: int) -> SiteRow:
    a, total, *pairs = row
    if not total:
        return EMPTY_ROW
    fields = [a + offset, total]
    for rank, b in zip(pairs[::2], pairs[1::2], strict=True):
        fields += [rank, b + offset if rank else 0]
    return _as_row(fields)


def _as_row(fields: list[int]) -> SiteRow:
    a, total, r0, b0, r1, b1, r2, b2 = fields + [0] * (ROW_WIDTH - len(fields))
    return a, total, r0, b0, r1, b1, r2, b2
