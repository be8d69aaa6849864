"""The device arena under churn of mixed ranks: adapters of one piece against adapters that are cut.

The real ledger with the sizes of Llama-3.1-8B's projections in bf16 on one GPU; no device needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from random import Random
from typing import Any

from lorafleet.cache.slots import SlotLedger

RANKS = (4, 8, 16, 32, 64, 128, 256)
NUM_ADAPTERS, REQUESTS = 1000, 20_000
ROWS = 32  # requests that run at once, each on an adapter of its own choice
ARENA_BYTES, NUM_SLOTS, ALIGNMENT = 8 << 30, 512, 256
LAYERS, ITEMSIZE = 32, 2
# Of each site: its targets' inputs together, and the outputs of each.
SITES = (
    (3 * 4096, (4096, 1024, 1024)),
    (4096, (4096,)),
    (2 * 4096, (14336, 14336)),
    (14336, (4096,)),
)


@dataclass(frozen=True, slots=True)
class _Shape:
    nbytes: int
    piece: int

    @classmethod
    def of(cls, rank: int) -> _Shape:
        """All linear layers at one rank."""
        blocks = [ITEMSIZE * rank * width for a, b in SITES for width in (a, *b)]
        return cls(LAYERS * sum(blocks), max(blocks))


def measure() -> dict[str, Any]:
    """Both ways over the same requests."""
    return {
        "case": "the device arena under churn",
        "ranks": RANKS,
        "adapters": NUM_ADAPTERS,
        "requests": REQUESTS,
        "arena_bytes": ARENA_BYTES,
        "one_piece": _churn(is_cut=False),
        "cut": _churn(is_cut=True),
    }


def _churn(*, is_cut: bool) -> dict[str, float]:
    random = Random(0)
    shapes = [_Shape.of(random.choice(RANKS)) for _ in range(NUM_ADAPTERS)]
    weights = [1 / (i + 1) for i in range(NUM_ADAPTERS)]  # Zipf
    payload = 0  # bytes of the adapters in the arena, without what their extents waste

    def on_evicted(adapter: Hashable) -> None:
        nonlocal payload
        assert isinstance(adapter, int)
        payload -= shapes[adapter].nbytes

    ledger = SlotLedger(NUM_SLOTS, ARENA_BYTES, ALIGNMENT, on_evicted)
    running: deque[int] = deque()
    hits, extents, used, num_needless = 0, list[int](), list[float](), 0
    for adapter in random.choices(range(NUM_ADAPTERS), weights, k=REQUESTS):
        shape, slot = shapes[adapter], ledger.find(adapter)
        hits += slot is not None
        while slot is None:
            evictions, before = ledger.num_evictions, payload
            slot = ledger.bind(adapter, shape.nbytes, (), shape.piece if is_cut else 0)
            if slot is None:  # what runs must end first
                ledger.release(running.popleft())
                continue
            payload += shape.nbytes
            ledger.set_ready(slot.number)
            extents.append(len(slot.extents))
            if ledger.num_evictions > evictions:
                used.append(before / ledger.capacity)
                num_needless += before + shape.nbytes <= ledger.capacity
        ledger.use(slot.number)
        running.append(slot.number)
        if len(running) > ROWS:
            ledger.release(running.popleft())
    return {
        "hit_rate": hits / REQUESTS,
        "loads": REQUESTS - hits,
        "evictions": ledger.num_evictions,
        "evicting_loads_with_bytes_to_spare": num_needless,
        "mean_used_when_evicting": sum(used) / len(used),
        "least_used_when_evicting": min(used),
        "mean_extents": sum(extents) / len(extents),
        "most_extents": max(extents),
    }
