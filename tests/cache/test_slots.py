"""SlotLedger and ExtentLedger."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cache.extents import ExtentLedger
from lorafleet.cache.slots import SlotLedger


def bind(ledger: SlotLedger, owner: str, nbytes: int, wanted: tuple[int, ...] = ()) -> int:
    """Binds and makes ready; the slot's number, 0 if there was no place."""
    slot = ledger.bind(owner, nbytes, wanted)
    if slot is None:
        return 0
    ledger.set_ready(slot.number)
    return slot.number


@given(st.lists(st.one_of(st.integers(0, 9), st.integers(1, 300)), max_size=60))
def test_extents_tile_the_arena(actions: list[int]) -> None:
    arena = ExtentLedger(1050, 100)
    taken: list[tuple[int, int]] = []
    for action in actions:
        if action < 10 and taken:
            arena.give(*taken.pop(action % len(taken)))
        else:
            fits = arena.fits(action)
            offset = arena.take(action)
            assert (offset is not None) == fits
            if offset is not None:
                assert offset % 100 == 0
                taken.append((offset, action))
        arena.check(taken)
    for offset, nbytes in taken:
        arena.give(offset, nbytes)
    assert arena.take(1000) == 0


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


def test_a_fragmented_arena_costs_more_evictions() -> None:
    ledger = SlotLedger(8, 1024, 256)
    for name in "abcd":
        bind(ledger, name, 256)
    ledger.use(2)
    ledger.release(2)  # b is the most recently used: a, c, d go before it
    assert bind(ledger, "wide", 512) > 0
    assert ledger.num_evictions == 3
    slot = ledger.find("wide")
    assert slot is not None
    assert slot.offset == 512
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
    assert ledger.room == 512
    assert ledger.bind("wide", 768, ()) is None, "the kept one lies in the way"
    assert bind(ledger, "most", 512) > 0
    assert bind(ledger, "b", 512) > 0
    assert evicted == ["a", "most"]
    assert ledger.find("kept") is not None
    ledger.check()
    ledger.unkeep("kept")
    assert ledger.room == 1024
    assert bind(ledger, "wide", 1024) > 0
    ledger.check()


def test_the_room_of_a_ledger_with_every_slot_kept_is_none() -> None:
    ledger = SlotLedger(2, 4096, 256)
    for name in "ab":
        bind(ledger, name, 256)
        ledger.keep(name)
    assert ledger.room == 0
    ledger.unbind("a")
    assert ledger.room == 4096 - 512, "behind b, which is second"
    ledger.check()


def test_check_finds_a_user_that_was_not_released() -> None:
    ledger = SlotLedger(1, 256, 256)
    ledger.use(bind(ledger, "a", 1))
    with pytest.raises(AssertionError, match="other users"):
        ledger.check()
