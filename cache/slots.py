"""SlotLedger: which adapter is in which device slot, and where in the arena."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass

from lorafleet.cache.extents import ExtentLedger


@dataclass(slots=True)
class Slot:
    """A slot bound to an owner's bytes."""

    number: int
    owner: Hashable
    offset: int  # bytes from the start of the arena
    nbytes: int
    users: int = 0  # running rows
    is_ready: bool = False  # the copy into the arena has finished


class SlotLedger:
    """Slots 1 .. num_slots over an arena. Slots without users stay until their place is needed."""

    def __init__(self, num_slots: int, arena_bytes: int, alignment: int) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self._arena = ExtentLedger(arena_bytes, alignment)
        self._free = list(range(num_slots, 0, -1))
        self._slots: dict[int, Slot] = {}
        self._bound: OrderedDict[Hashable, Slot] = OrderedDict()  # least recently used first

    @property
    def capacity(self) -> int:
        """The largest adapter the arena can hold, in bytes."""
        return self._arena.capacity

    def find(self, owner: Hashable) -> Slot | None:
        """The owner's slot, ready or not."""
        return self._bound.get(owner)

    def bind(self, owner: Hashable, nbytes: int, wanted: Collection[int]) -> Slot | None:
        """A new slot for an owner that has none, not ready yet.

        Evicts, least recently used first, slots that are ready, unused and not in `wanted`; more
        than one if the arena is fragmented. None, and nothing evicted, if that is not enough.
        """
        victims = self._victims(nbytes, wanted)
        if victims is None:
            return None
        for victim in victims:
            self.num_evictions += 1
            self.unbind(victim.owner)
        offset = self._arena.take(nbytes)
        assert offset is not None
        slot = Slot(self._free.pop(), owner, offset, nbytes)
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
            self._arena.give(slot.offset, slot.nbytes)

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
        self._arena.check([(slot.offset, slot.nbytes) for slot in self._slots.values()])

    def _victims(self, nbytes: int, wanted: Collection[int]) -> list[Slot] | None:
        """Whom to evict so that `nbytes` fit; None if nobody is left to evict and they do not."""
        if self._free and self._arena.fits(nbytes):
            return []
        arena, victims = self._arena.copy(), []
        for slot in self._bound.values():
            # A slot that is still loading stays: its ready report would be taken for the next's.
            if slot.users or not slot.is_ready or slot.number in wanted:
                continue
            victims.append(slot)
            arena.give(slot.offset, slot.nbytes)
            if arena.fits(nbytes):
                return victims
        return None
