"""HostTier: packed adapters in host memory, within a byte budget."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch

from lorafleet.cache.errors import TierFull
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packed_form import PackedForm
from lorafleet.cache.packing import PackedAdapter
from lorafleet.proto.messages import AdapterContent


class HostTier:
    """Obeys: who is evicted is the router's decision, made known by `drop`. Thread-safe."""

    def __init__(self, budget_bytes: int, dtype: torch.dtype, pin: bool) -> None:
        """`pin`: whether a CUDA device copies from here."""
        self._budget, self._dtype, self._pin = budget_bytes, dtype, pin
        self._used = 0
        self._adapters: dict[AdapterContent, PackedAdapter] = {}
        self._filling: set[AdapterContent] = set()
        self._lock = Lock()  # guards _used, _adapters and _filling

    @property
    def used_bytes(self) -> int:
        """Bytes held or reserved."""
        return self._used

    def put(
        self, content: AdapterContent, form: PackedForm, fill: Callable[[PackedAdapter], None]
    ) -> PackedAdapter:
        """Reserves room, allocates, lets `fill` write the buffer, and keeps the result.

        Raises TierFull, before anything is allocated, when the budget has no room. Whatever
        `fill` raises gives the room back.
        """
        self._reserve(content, form.nbytes)
        try:
            packed = allocate(form, self._dtype, self._pin)
            fill(packed)
        except BaseException:
            self._release(content, form.nbytes)
            raise
        with self._lock:
            self._filling.remove(content)
            self._adapters[content] = packed
        return packed

    def get(self, content: AdapterContent) -> PackedAdapter | None:
        """The packed adapter, or None."""
        return self._adapters.get(content)

    def contents(self) -> frozenset[AdapterContent]:
        """Every content that has room, filled or being filled, at one moment."""
        with self._lock:
            return frozenset(self._adapters) | self._filling

    def drop(self, content: AdapterContent) -> None:
        """Forgets an adapter; copies under way hold on to its memory until they are done."""
        with self._lock:
            packed = self._adapters.pop(content, None)
            if packed is not None:
                self._used -= packed.nbytes

    def _reserve(self, content: AdapterContent, nbytes: int) -> None:
        with self._lock:
            assert content not in self._adapters.keys() | self._filling, content
            if self._used + nbytes > self._budget:
                raise TierFull(
                    f"The adapter needs {nbytes} bytes of host memory; "
                    f"{max(0, self._budget - self._used)} of {self._budget} are free."
                )
            self._used += nbytes
            self._filling.add(content)

    def _release(self, content: AdapterContent, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes
            self._filling.remove(content)
