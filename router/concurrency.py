"""How many requests are in the service at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lorafleet.router.errors import Overloaded, RequestError


class Draining(RequestError):
    """The service is about to stop and takes no new work."""

    status = 503
    error_type = "draining"


class Concurrency:
    """Counts requests, refuses those over the limit, and knows when the last one has left."""

    def __init__(self, limit: int) -> None:
        self.is_draining = False
        self._limit = limit
        self._count = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """A request's stay. Raises Overloaded at the limit, Draining when no more are taken."""
        if self.is_draining:
            raise Draining("the service is shutting down")
        if self._count >= self._limit:
            raise Overloaded(f"{self._limit} requests are in the service, which is its limit")
        self._count += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._empty.set()

    async def drain(self) -> None:
        """Takes no more requests and waits for the last to leave."""
        self.is_draining = True
        await self._empty.wait()
