"""Adapter: one adapter's content as the router knows it, and the pins that keep it in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorafleet.proto.messages import AdapterContent, AdapterInfo, AdapterKey, ShardInfo, Tier


class Adapter:
    """An adapter with one digest; new content under the same key is another Adapter.

    Compared by identity. `info.packed_bytes` is the largest of all ranks.
    """

    def __init__(
        self,
        info: AdapterInfo,
        on_unpinned: Callable[[], None],
    ) -> None:
        self.info = info
        self.made_of: tuple[str, ...] = ()  # digests of a merged adapter's members
        self.num_pins = 0  # sequences and device copies under way that need the host copy
        self.in_host = False
        self._on_unpinned = on_unpinned

    @property
    def key(self) -> AdapterKey:
        """What requests call it."""
        return self.info.key

    @property
    def content(self) -> AdapterContent:
        """What it is, for as long as its source does not change it."""
        return self.info.content

    @property
    def nbytes(self) -> int:
        """Packed size on a rank."""
        return self.info.packed_bytes

    @property
    def piece_bytes(self) -> int:
        """What must lie in one piece in the arena, at most."""
        return self.info.piece_bytes or self.nbytes

    @property
    def is_pinned(self) -> bool:
        """Whether the host copy must stay."""
        return self.num_pins > 0

    def pin(self) -> AdapterPin:
        """Keeps the host copy, if there is one, until the pin is closed."""
        self.num_pins += 1
        return AdapterPin(self)

    def _unpin(self) -> None:
        self.num_pins -= 1
        if self.num_pins == 0:
            self._on_unpinned()


class AdapterPin:
    """A hold on an adapter's host copy."""

    __slots__ = ("_is_open", "adapter")

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._is_open = True

    def __enter__(self) -> AdapterPin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go; closing twice is harmless."""
        if self._is_open:
            self._is_open = False
            self.adapter._unpin()


@dataclass(frozen=True, slots=True)
class AdapterHold:
    """What a request holds before its prompt is tokenized: its adapter, or nothing."""

    pin: AdapterPin | None = None
    seconds: float = 0.0  # what it took to get it

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, None for the base model."""
        return self.pin.adapter if self.pin is not None else None

    def close(self) -> None:
        """Lets go; closing twice is harmless."""
        if self.pin is not None:
            self.pin.close()


def num_tokens(info: ShardInfo, adapter: Adapter | None) -> int:
    """Token ids that prompts to an adapter, or to the base model, may hold."""
    own = adapter.info.vocab_size if adapter is not None else 0
    return own or info.vocab_size


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """Where an adapter is."""

    key: AdapterKey
    info: AdapterInfo
    tier: Tier
    slot: int = 0  # device slot, 0 = not on the device
    pinned: Tier = Tier.NONE  # the highest tier an operator pinned it in
    in_use: int = 0  # sequences and device copies under way that need it
