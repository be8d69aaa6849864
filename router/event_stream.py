"""Server-sent events to one client, kept alive while there is nothing to say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from aiohttp import web

KEEP_ALIVE_SECONDS = 15.0
_COMMENT = b":\n\n"  # clients skip it, proxies see traffic
_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventResponse(web.StreamResponse):
    """A stream's response: its status is sent long before `outcome` is known."""

    outcome = 200  # the status it would have, had it not begun with another one


class EventStream:
    """One response. It begins with the first write, so errors before that can still have a status.

    `headers` is asked when it begins. Every write is whole frames, so writers may alternate.
    """

    def __init__(self, request: web.Request, headers: Callable[[], dict[str, str]]) -> None:
        self.has_begun = False
        self.response = EventResponse()
        self._request = request
        self._headers = headers
        self._beginning = asyncio.Lock()
        self._written_at = monotonic()
        self._num_writers = 0  # inside `write`, maybe waiting for a slow client

    async def write(self, frames: bytes) -> None:
        """Sends frames. Raises ConnectionResetError when the client is gone."""
        self._num_writers += 1
        try:
            if not self.has_begun:
                await self._begin()
            self._written_at = monotonic()
            await self.response.write(frames)
        finally:
            self._num_writers -= 1

    def is_silent_since(self, time: float) -> bool:
        """Whether nothing was sent since `time` (monotonic) and nothing is about to be."""
        return self._written_at <= time and not self._num_writers

    async def _begin(self) -> None:
        async with self._beginning:
            if not self.has_begun:
                self.response.headers.update(_HEADERS | self._headers())
                await self.response.prepare(self._request)
                self.has_begun = True


class KeepAlive:
    """One task that writes a comment to each stream that has been silent for a while."""

    def __init__(self, seconds: float = KEEP_ALIVE_SECONDS) -> None:
        self.seconds = seconds  # of silence before a comment
        self._streams: set[EventStream] = set()

    @contextmanager
    def watch(self, stream: EventStream) -> Iterator[None]:
        """Keeps `stream` alive inside the block."""
        self._streams.add(stream)
        try:
            yield
        finally:
            self._streams.discard(stream)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self.seconds / 3)
            time = monotonic() - self.seconds
            for stream in [stream for stream in self._streams if stream.is_silent_since(time)]:
                try:
                    await stream.write(_COMMENT)
                except ConnectionError:
                    self._streams.discard(stream)
