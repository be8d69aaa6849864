"""DeviceSlots: adapters in device slots, and the copies under way to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from lorafleet.cache.slots import SlotLedger
from lorafleet.proto.messages import AdapterMove
from lorafleet.router.adapter import Adapter, AdapterPin
from lorafleet.router.step import Step

# Bytes of adapters one plan may start copying, beyond its first move: the copies share one stream,
# and the first waiting sequence should not wait for all of them.
MAX_MOVE_BYTES_PER_PLAN = 64 << 20


class DeviceSlots:
    """The slot ledger, with a pin on the host copy of every adapter being copied from it."""

    def __init__(
        self,
        ledger: SlotLedger,
        on_loaded: Callable[[Adapter, float], None] = lambda adapter, seconds: None,
    ) -> None:
        """`on_loaded` hears of each finished copy and its seconds, from plan to result."""
        self.ledger = ledger
        self._on_loaded = on_loaded
        self._loading: dict[int, tuple[AdapterPin, float]] = {}  # by slot, with when it began
        # Wanted on the device by no sequence, oldest first, and who hears of it.
        self._asked: dict[Adapter, list[Callable[[], None]]] = {}

    @property
    def num_loading(self) -> int:
        """Copies planned and not reported ready."""
        return len(self._loading)

    def is_ready(self, adapter: Adapter) -> bool:
        """Whether it is on the device."""
        slot = self.ledger.find(adapter)
        return slot is not None and slot.is_ready

    def ask(self, adapter: Adapter, on_ready: Callable[[], None]) -> None:
        """Has one of the next plans copy an adapter to the device.

        `on_ready` is called when it is there, before another can take its place.
        """
        if self.is_ready(adapter):
            on_ready()
        else:
            self._asked.setdefault(adapter, []).append(on_ready)

    def forget(self, adapter: Adapter) -> None:
        """Its host copy goes, so its slot does too; nobody may be using it."""
        self._asked.pop(adapter, None)
        self.ledger.unbind(adapter)

    def load_asked(self, step: Step, now: float) -> None:
        """Loads what was asked for, as far as there is a place."""
        for adapter in list(self._asked):
            if not self.slot_of(adapter) and self.may_load(adapter, step):
                self.load(adapter, step, (), now)

    def load(self, adapter: Adapter, step: Step, wanted: Collection[int], now: float) -> None:
        """A slot for an adapter that has none, with its move in `step`, if there is a place.

        Slots in `wanted` are not taken away.
        """
        # The copy is ordered after every step already sent, so a slot whose last sequence has just
        # ended can be overwritten although a step in flight still computes with it.
        slot = self.ledger.bind(adapter, adapter.nbytes, wanted, adapter.piece_bytes)
        if slot is not None:
            offsets, nbytes = map(list, zip(*slot.extents, strict=True))
            key, digest = adapter.content
            step.plan.moves.append(AdapterMove(key, slot.number, offsets, nbytes, digest))
            self._loading[slot.number] = (adapter.pin(), now)

    def may_load(self, adapter: Adapter, step: Step) -> bool:
        """Whether the step may carry one more move."""
        if not step.plan.moves:
            return True
        slots = (self._loading[move.slot][0].adapter for move in step.plan.moves)
        return sum(moved.nbytes for moved in slots) + adapter.nbytes <= MAX_MOVE_BYTES_PER_PLAN

    def set_ready(self, numbers: Iterable[int], now: float) -> None:
        """Copies a result reports finished."""
        for number in numbers:
            self.ledger.set_ready(number)
            pin, started_at = self._loading.pop(number)
            self._on_loaded(pin.adapter, now - started_at)
            for on_ready in self._asked.pop(pin.adapter, ()):
                on_ready()
            pin.close()

    def slot_of(self, adapter: Adapter) -> int:
        """The adapter's slot, 0 if it is not on the device."""
        slot = self.ledger.find(adapter)
        return slot.number if slot is not None else 0
