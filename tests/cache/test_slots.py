"""SlotLedger and ExtentLedger."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cache.extents import Extent, ExtentLedger
from lorafleet.cache.packed_form import EMPTY_ROW, PackedForm, SiteRow
from lorafleet.cache.slots import SlotLedger


def bind(ledger: SlotLedger, owner: str, nbytes: int, wanted: tuple[int, ...] = ()) -> int:
    """Binds and makes ready; the slot's number, 0 if there was no place."""
    slot = ledger.bind(owner, nbytes, wanted)
    if slot is None:
        return 0
    ledger.set_ready(slot.number)
    return slot.number


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), max_size=40), st.randoms())
def test_extents_tile_the_arena_and_hold_their_pieces(
    adapters: list[list[int]], random: Random
) -> None:
    """Any ranks' pieces, not only those of the largest, find a place in what was taken."""
    arena = ExtentLedger(30050, 100)
    taken: list[tuple[Extent, ...]] = []
    for pieces in adapters:
        while taken and random.random() < 0.4:
            arena.give(taken.pop(random.randrange(len(taken))))
        nbytes, piece = 100 * sum(pieces), 100 * max(pieces)
        fits = arena.fits(nbytes, piece)
        free = [stop - start for start, stop in arena._free]
        extents = arena.take(nbytes, piece)
        assert (extents is not None) == fits
        # Bytes are enough but for less than a piece in each free interval.
        assert fits or sum(free) < nbytes + len(free) * (piece - 100)
        if extents is not None:
            taken.append(extents)
            assert all(offset % 100 == size % 100 == 0 for offset, size in extents)
            assert len(extents) == 1 or max(free) < nbytes, "one interval would have done"
            smaller = [random.randint(1, size) for size in pieces]
            assert laid_out(pieces, extents)
            assert laid_out(smaller, extents)
        arena.check([extent for extents in taken for extent in extents])
    for extents in taken:
        arena.give(extents)
    assert arena.take(30000, 30000) == ((0, 30000),)


def laid_out(pieces: list[int], extents: tuple[Extent, ...]) -> bool:
    """Whether a packed form of such pieces, in units of 100 elements, can be placed."""
    rows: list[SiteRow] = []
    start = 0
    for size in pieces:
        rows.append((start, 1, *EMPTY_ROW[2:]))
        start += 100 * size
    placement = PackedForm(tuple(rows), start, 1).place(extents)
    ends = [row[0] + 100 * size for row, size in zip(placement.rows, pieces, strict=True)]
    inside = [
        any(offset <= row[0] and end <= offset + nbytes for offset, nbytes in extents)
        for row, end in zip(placement.rows, ends, strict=True)
    ]
    return all(inside) and sum(run.stop - run.start for run in placement.runs) == start


@given(st.lists(st.tuples(st.sampled_from([4, 8, 16, 64, 256]), st.booleans()), max_size=60))
def test_what_is_evicted_is_bytes_not_an_interval(uses: list[tuple[int, bool]]) -> None:
    """Idle slots go only while there are too few bytes, wherever these are."""
    ledger = SlotLedger(64, 400 * 256, 256)
    for owner, (rank, stays) in enumerate(uses):
        before, evictions = ledger.used_bytes, ledger.num_evictions
        in_use = sum(n for s in ledger._slots.values() if s.users for _, n in s.extents)
        slot = ledger.bind(owner, rank * 256, (), piece=256)
        if slot is None:
            assert in_use + rank * 256 > ledger.capacity
            continue
        assert sum(nbytes for _, nbytes in slot.extents) == rank * 256
        if ledger.num_evictions > evictions:
            assert before + rank * 256 > ledger.capacity, "pieces of 256 bytes waste nothing"
        ledger.set_ready(slot.number)
        if stays and ledger.used_bytes < ledger.capacity // 2:
            ledger.use(slot.number)
        ledger.check([slot.number for slot in ledger._slots.values() if slot.users])


def test_the_least_recently_used_slot_goes_first() -> None:
    ledger = SlotLedger(2, 1024, 256)
    a, b = bind(ledger, "a", 256), bind(ledger, "b", 256)
    ledger.use(a)
    ledger.release(a)
    c = bind(ledger, "c", 256)
    assert c == b
    assert ledger.find("b") is None
    assert ledger.find("a") is not None
    assert ledger.num_evictions == 1
    ledger.check()


def test_used_loading_and_wanted_slots_stay() -> None:
    ledger = SlotLedger(3, 1024, 256)
    used, wanted = bind(ledger, "used", 256), bind(ledger, "wanted", 256)
    ledger.use(used)
    assert ledger.bind("loading", 256, ()) is not None
    assert ledger.bind("new", 256, (wanted,)) is None
    assert ledger.num_evictions == 0
    assert bind(ledger, "new", 256) == wanted
    ledger.check([used])


def test_an_adapter_of_many_pieces_takes_the_gaps_there_are() -> None:
    ledger = SlotLedger(8, 1024, 256)
    for name in "abcd":
        bind(ledger, name, 256)
    ledger.use(2)
    ledger.release(2)  # as below: a and c go, whose bytes are enough
    slot = ledger.bind("wide", 512, (), piece=256)
    assert slot is not None
    assert slot.extents == ((0, 256), (512, 256))
    assert ledger.num_evictions == 2
    ledger.check()


def test_an_adapter_of_one_piece_costs_more_evictions_in_a_fragmented_arena() -> None:
    ledger = SlotLedger(8, 1024, 256)
    for name in "abcd":
        bind(ledger, name, 256)
    ledger.use(2)
    ledger.release(2)  # b is the most recently used: a, c, d go before it
    assert bind(ledger, "wide", 512) > 0
    assert ledger.num_evictions == 3
    slot = ledger.find("wide")
    assert slot is not None
    assert slot.extents == ((512, 512),)
    assert ledger.find("b") is not None
    ledger.check()


def test_nothing_is_evicted_in_vain() -> None:
    ledger = SlotLedger(4, 1024, 256)
    a, b = bind(ledger, "a", 256), bind(ledger, "b", 256)
    bind(ledger, "c", 256)
    ledger.use(b)
    assert ledger.bind("wide", 1024, ()) is None
    assert ledger.find("a") is not None
    assert (a, ledger.num_evictions) == (1, 0)


def test_a_kept_slot_is_not_evicted_and_the_others_are_told_of() -> None:
    evicted: list[object] = []
    ledger = SlotLedger(4, 1024, 256, evicted.append)
    bind(ledger, "a", 256)
    bind(ledger, "kept", 256)
    ledger.keep("kept")
    assert ledger.room(768) == 512
    assert ledger.room(256) == 768, "in two extents"
    assert ledger.bind("wide", 768, ()) is None, "the kept one lies in the way"
    assert bind(ledger, "most", 512) > 0
    assert bind(ledger, "b", 512) > 0
    assert evicted == ["a", "most"]
    assert ledger.find("kept") is not None
    ledger.check()
    ledger.unkeep("kept")
    assert ledger.room(1024) == 1024
    assert bind(ledger, "wide", 1024) > 0
    ledger.check()


def test_the_room_of_a_ledger_with_every_slot_kept_is_none() -> None:
    ledger = SlotLedger(2, 4096, 256)
    for name in "ab":
        bind(ledger, name, 256)
        ledger.keep(name)
    assert ledger.room(256) == 0
    ledger.unbind("a")
    assert ledger.room(4096) == 4096 - 512, "behind b, which is second"
    ledger.check()


def test_check_finds_a_user_that_was_not_released() -> None:
    ledger = SlotLedger(1, 256, 256)
    ledger.use(bind(ledger, "a", 1))
    with pytest.raises(AssertionError, match="other users"):
        ledger.check()
