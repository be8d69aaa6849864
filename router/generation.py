"""Generation: one request's events, as its handler sees them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType

from lorafleet.router.adapter import AdapterPin
from lorafleet.router.errors import RequestError
from lorafleet.router.request import TokenEvent
from lorafleet.router.sequence import Sequence


class Generation:
    """Iterate it inside `async with`; leaving that, however, ends the request and frees its row.

    Iteration ends after the event with `finish`, or raises GenerationFailed, DeadlineExceeded or
    ShardLost after the tokens that came before. One task at a time may iterate.
    """

    def __init__(
        self, sequence: Sequence, pin: AdapterPin | None, abort: Callable[[Sequence], None]
    ) -> None:
        """Within a running event loop, whose clock ends it at its request's deadline."""
        self._sequence = sequence
        self._pin = pin
        self._abort = abort
        self._events: deque[TokenEvent] = deque()
        self._error: RequestError | None = None
        self._is_over = False  # no more events will come
        self._waiter: asyncio.Future[None] | None = None
        self._timer = self._start_timer()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._sequence.num_prompt

    @property
    def prompt_logprobs(self) -> list[float]:
        """Log-probabilities of prompt tokens 1, 2, ...; complete once the first event is there.

        Empty unless the request's sampling asks for them.
        """
        return self._sequence.prompt_logprobs

    @property
    def queue_seconds(self) -> float:
        """From submission, adapter fetch included, to the first step; 0 before that."""
        started_at = self._sequence.started_at
        return started_at - self._sequence.submitted_at if started_at else 0.0

    @property
    def submitted_at(self) -> float:
        """When the engine got the request, in `time.monotonic()` seconds."""
        return self._sequence.submitted_at

    @property
    def started_at(self) -> float:
        """When it was first planned, in `time.monotonic()` seconds; 0 before that."""
        return self._sequence.started_at

    @property
    def first_token_at(self) -> float:
        """When its first token arrived, in `time.monotonic()` seconds; 0 before that."""
        return self._sequence.first_token_at

    def close(self) -> None:
        """Ends the request; harmless when it has ended."""
        self._abort(self._sequence)
        self._end()

    def push(self, event: TokenEvent) -> None:
        """Engine only: the next token."""
        self._events.append(event)
        if event.finish is not None:
            self._end()
        else:
            self._wake()

    def fail(self, error: RequestError) -> None:
        """Engine only: nothing follows but this error."""
        if not self._is_over:
            self._error = error
            self._end()

    def _start_timer(self) -> asyncio.TimerHandle | None:
        when = self._sequence.request.deadline.when
        if when is None:
            return None
        return asyncio.get_running_loop().call_at(when, self._expire)

    def _expire(self) -> None:
        self._abort(self._sequence)
        self.fail(self._sequence.request.deadline.error())

    def _end(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._pin is not None:
            self._pin.close()
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
