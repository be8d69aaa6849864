"""How much is in the service at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lorafleet.router.errors import InvalidRequest, Overloaded, RequestError


class Draining(RequestError):
    """The service is about to stop and takes no new work."""

    status = 503
    error_type = "draining"


class Concurrency:
    """Limits the sequences of all requests, and knows when the last request has left.

    A request arrives with its headers and enters with its whole body: one whose body does not come
    takes nobody's place.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: of sequences. Most requests are one; `n`, `best_of` and prompts multiply."""
        self.is_draining = False
        self._limit = limit
        self._num_requests = self._num_sequences = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def arrive(self) -> Iterator[None]:
        """A request's stay. Raises Draining when no more are taken, Overloaded at the limit."""
        if self.is_draining:
            raise Draining("the service is shutting down")
        self._check(1)
        self._num_requests += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                self._empty.set()

    @contextmanager
    def enter(self, num_sequences: int = 1, field: str = "") -> Iterator[None]:
        """The stay of a request's sequences, within that of the request.

        Raises Overloaded at the limit, InvalidRequest naming `field` for more than the limit.
        """
        if num_sequences > self._limit:
            raise InvalidRequest(
                f"`{field}` makes {num_sequences} sequences; the service takes {self._limit}", field
            )
        self._check(num_sequences)
        self._num_sequences += num_sequences
        try:
            yield
        finally:
            self._num_sequences -= num_sequences

    def _check(self, num_sequences: int) -> None:
        if self._num_sequences + num_sequences > self._limit:
            raise Overloaded(
                f"{self._num_sequences} sequences are in the service, whose limit is {self._limit}"
            )

    async def drain(self) -> None:
        """Takes no more requests and waits for the last to leave."""
        self.is_draining = True
        await self._empty.wait()
