"""KeyLocks: one lock per key, there only while someone holds or awaits it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Lock


class KeyLocks:
    """Work on one key is serial; work on different keys is not."""

    def __init__(self) -> None:
        self._guard = Lock()
        self._locks: dict[Hashable, tuple[Lock, int]] = {}  # key -> lock, holders and waiters

    @contextmanager
    def hold(self, key: Hashable, *, wait: bool = True) -> Iterator[bool]:
        """Whether the key is held: always if `wait`, otherwise unless somebody else holds it."""
        with self._guard:
            lock, users = self._locks.get(key, (Lock(), 0))
            self._locks[key] = lock, users + 1
        try:
            is_held = lock.acquire(blocking=wait)
            try:
                yield is_held
            finally:
                if is_held:
                    lock.release()
        finally:
            with self._guard:
                lock, users = self._locks.pop(key)
                if users > 1:
                    self._locks[key] = lock, users - 1
