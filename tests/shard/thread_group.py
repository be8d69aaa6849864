"""Ranks as threads of one process: the collectives of a Group without a backend."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

from lorafleet.shard.group import Group

T = TypeVar("T")


class ThreadGroup(Group):
    """One rank of `size`; ranks that share `slots` and `barrier` are one group."""

    def __init__(
        self, rank: int, size: int, slots: list[torch.Tensor | None], barrier: Barrier
    ) -> None:
        super().__init__(rank, 1, torch.device("cpu"), "")
        self.size = size
        self._slots, self._barrier = slots, barrier

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sums in rank order."""
        return x.copy_(torch.stack(self._exchange(x)).sum(dim=0))

    def all_gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """Joins in rank order."""
        return torch.cat(self._exchange(x), dim=1)

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self.rank] = x.clone()
        self._barrier.wait(30)
        found = [slot for slot in self._slots if slot is not None]
        self._barrier.wait(30)
        return found


def on_ranks(size: int, run: Callable[[Group], T]) -> list[T]:
    """What every rank's `run` returns."""
    slots: list[torch.Tensor | None] = [None] * size
    barrier = Barrier(size)

    def guarded(rank: int) -> T:
        try:
            return run(ThreadGroup(rank, size, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, range(size)))
