"""DeviceSlots: adapters in device slots, and the copies under way to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lorafleet.cache.slots import SlotLedger
from lorafleet.proto.messages import AdapterMove
from lorafleet.router.adapter import Adapter, AdapterPin
from lorafleet.router.step import Step

# Bytes of adapters one plan may start copying, beyond its first move: the copies share one stream,
# and the first waiting sequence should not wait for all of them.
MAX_MOVE_BYTES_PER_PLAN = 64 << 20


class DeviceSlots:
    """The slot ledger, with a pin on the host copy of every adapter being copied from it."""

    def __init__(self, ledger: SlotLedger) -> None:
        self.ledger = ledger
        self._loading: dict[int, AdapterPin] = {}  # by slot

    @property
    def num_loading(self) -> int:
        """Copies planned and not reported ready."""
        return len(self._loading)

    def load(self, adapter: Adapter, step: Step, wanted: Collection[int]) -> None:
        """A slot for an adapter that has none, with its move in `step`, if there is a place.

        Slots in `wanted` are not taken away.
        """
        # The copy is ordered after every step already sent, so a slot whose last sequence has just
        # ended can be overwritten although a step in flight still computes with it.
        slot = self.ledger.bind(adapter, adapter.nbytes, wanted)
        if slot is not None:
            step.plan.moves.append(AdapterMove(adapter.key, slot.number, slot.offset))
            self._loading[slot.number] = adapter.pin()

    def may_load(self, adapter: Adapter, step: Step) -> bool:
        """Whether the step may carry one more move."""
        if not step.plan.moves:
            return True
        slots = (self._loading[move.slot].adapter for move in step.plan.moves)
        return sum(moved.nbytes for moved in slots) + adapter.nbytes <= MAX_MOVE_BYTES_PER_PLAN

    def set_ready(self, numbers: Iterable[int]) -> None:
        """Copies a result reports finished."""
        for number in numbers:
            self.ledger.set_ready(number)
            self._loading.pop(number).close()

    def slot_of(self, adapter: Adapter) -> int:
        """The adapter's slot, 0 if it is not on the device."""
        slot = self.ledger.find(adapter)
        return slot.number if slot is not None else 0
