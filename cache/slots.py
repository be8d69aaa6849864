"""SlotLedger: which adapter is in which device slot, and where in the arena."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass

from lorafleet.cache.extents import Extent, ExtentLedger


@dataclass(slots=True)
class Slot:
    """A slot bound to an owner's bytes."""

    number: int
    owner: Hashable
    extents: tuple[Extent, ...]  # of the arena, in the order in which they are filled
    users: int = 0  # running rows
    is_ready: bool = False  # the copy into the arena has finished
    is_kept: bool = False  # not evicted for another adapter


class SlotLedger:
    """Slots 1 .. num_slots over an arena. Slots without users stay until their place is needed."""

    def __init__(
        self,
        num_slots: int,
        arena_bytes: int,
        alignment: int,
        on_evicted: Callable[[Hashable], None] = lambda _: None,
    ) -> None:
        """`on_evicted` hears of every owner that lost its slot to another."""
        self.num_slots = num_slots
        self._on_evicted = on_evicted
        self.num_evictions = 0
        self._arena = ExtentLedger(arena_bytes, alignment)
        self._free = list(range(num_slots, 0, -1))
        self._slots: dict[int, Slot] = {}
        self._bound: OrderedDict[Hashable, Slot] = OrderedDict()  # least recently used first
        self._spaces = [self._arena.capacity]  # bytes between kept slots

    @property
    def capacity(self) -> int:
        """The largest adapter the arena can hold, in bytes."""
        return self._arena.capacity

    def keep(self, owner: Hashable) -> None:
        """The owner's slot is not evicted until `unkeep`; it must have one."""
        self._bound[owner].is_kept = True
        self._spaces = self._between_kept()

    def unkeep(self, owner: Hashable) -> None:
        """The owner's slot, if it has one, may be evicted again."""
        if slot := self._bound.get(owner):
            slot.is_kept = False
            self._spaces = self._between_kept()

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena that slots hold."""
        return sum(nbytes for slot in self._slots.values() for _, nbytes in slot.extents)

    def room(self, piece: int) -> int:
        """The largest adapter, in bytes, that finds a place once all but kept slots are evicted.

        `piece`: bytes of its largest piece.
        """
        has_slot = any(not slot.is_kept for slot in self._slots.values()) or self._free
        return self._arena.room(self._spaces, piece) if has_slot else 0

    def find(self, owner: Hashable) -> Slot | None:
        """The owner's slot, ready or not."""
        return self._bound.get(owner)

    def bind(
        self, owner: Hashable, nbytes: int, wanted: Collection[int], piece: int = 0
    ) -> Slot | None:
        """A new slot for an owner that has none, not ready yet. `piece`: bytes of its largest
        piece, 0 = it is all of one piece.

        Evicts, least recently used first, slots that are ready, unused, not kept and not in
        `wanted`, until there are bytes enough in extents that are not much shorter than a piece.
        None, and nothing evicted, if that is not enough.
        """
        piece = piece or nbytes
        victims = self._victims(nbytes, piece, wanted)
        if victims is None:
            return None
        for victim in victims:
            self.num_evictions += 1
            self.unbind(victim.owner)
            self._on_evicted(victim.owner)
        extents = self._arena.take(nbytes, piece)
        assert extents is not None
        slot = Slot(self._free.pop(), owner, extents)
        self._slots[slot.number] = self._bound[owner] = slot
        return slot

    def unbind(self, owner: Hashable) -> None:
        """Forgets an owner's slot, if it has one; nobody may be using it."""
        slot = self._bound.pop(owner, None)
        if slot is not None:
            assert slot.users == 0
            assert slot.is_ready
            del self._slots[slot.number]
            self._free.append(slot.number)
            self._arena.give(slot.extents)
            if slot.is_kept:
                self._spaces = self._between_kept()

    def set_ready(self, number: int) -> None:
        """The copy into a slot has finished."""
        self._slots[number].is_ready = True

    def use(self, number: int) -> None:
        """A row runs on a ready slot; slot 0, the base model, takes nothing."""
        if number:
            slot = self._slots[number]
            assert slot.is_ready
            slot.users += 1
            self._bound.move_to_end(slot.owner)

    def release(self, number: int) -> None:
        """A row that used a slot is gone."""
        if number:
            slot = self._slots[number]
            slot.users -= 1
            assert slot.users >= 0
            self._bound.move_to_end(slot.owner)

    def check(self, used: Iterable[int] = ()) -> None:
        """Asserts that slots and arena balance and that rows use exactly the slots `used`."""
        numbers = sorted([*self._free, *self._slots])
        assert numbers == list(range(1, self.num_slots + 1)), "slots are lost"
        assert all(self._bound[slot.owner] is slot for slot in self._slots.values())
        assert len(self._bound) == len(self._slots)
        users = Counter(number for number in used if number)
        for slot in self._slots.values():
            assert slot.users == users[slot.number], f"slot {slot.number} has other users"
        assert self._spaces == self._between_kept()
        self._arena.check([extent for slot in self._slots.values() for extent in slot.extents])

    def _between_kept(self) -> list[int]:
        kept = sorted(extent for s in self._slots.values() if s.is_kept for extent in s.extents)
        spaces, end = [], 0
        for offset, nbytes in [*kept, (self.capacity, 0)]:
            spaces.append(offset - end)
            end = offset + nbytes
        return spaces

    def _victims(self, nbytes: int, piece: int, wanted: Collection[int]) -> list[Slot] | None:
        """Whom to evict so that `nbytes` fit; None if nobody is left to evict and they do not."""
        if self._free and self._arena.fits(nbytes, piece):
            return []
        arena, victims = self._arena.copy(), []
        for slot in self._bound.values():
            # A slot that is still loading stays: its ready report would be taken for the next's.
            is_needed = slot.users or slot.is_kept or slot.number in wanted
            if is_needed or not slot.is_ready:
                continue
            victims.append(slot)
            arena.give(slot.extents)
            if arena.fits(nbytes, piece):
                return victims
        return None
