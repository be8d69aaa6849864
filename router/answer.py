"""Answer: one HTTP request's sequences, from their first event to the end of the response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any
from urllib.parse import quote

from aiohttp import web

from lorafleet.proto.messages import AdapterKey
from lorafleet.router.body import to_json
from lorafleet.router.errors import GenerationFailed
from lorafleet.router.event_stream import EventStream
from lorafleet.router.failures import is_openai, status_of, to_object
from lorafleet.router.generation import Generation
from lorafleet.router.service import SERVICE, Clock
from lorafleet.router.text import Completion, Token
from lorafleet.router.usage import Served

_SAFE = "!#$&'()*+,-./:;=?@[]_~"  # header values are ASCII without control characters


@dataclass(slots=True)
class Answer:
    """Generations and their completions, pairwise; `headers` say what serves them."""

    request: web.Request
    clock: Clock
    prompt_tokens: int
    adapter: AdapterKey | None
    headers: Mapping[str, str]
    generations: list[Generation]
    completions: list[Completion]

    @property
    def generated_tokens(self) -> int:
        """Tokens so far, of all sequences."""
        return sum(len(completion.tokens) for completion in self.completions)

    async def whole(self, build: Callable[[], Any]) -> web.Response:
        """Waits for every completion; `build` then makes the JSON value to answer."""
        with self._measured():
            await _all(self._read(*pair) for pair in self._pairs())
            text = to_json(build())
            return web.Response(
                text=text, headers=self._headers_at_end(), content_type="application/json"
            )

    async def stream(
        self, frames: Callable[[int, Token], bytes], ending: Callable[[], bytes]
    ) -> web.StreamResponse:
        """Sends `frames` of each token of the completion with that index, then `ending`.

        An error before the first frame is raised; a later one ends the stream with its own frame.
        """
        stream = EventStream(self.request, self._headers_at_start)
        with self._measured(), self.request.app[SERVICE].keep_alive.watch(stream):
            try:
                await _all(
                    self._pump(*pair, stream, partial(frames, index))
                    for index, pair in enumerate(self._pairs())
                )
                if last := ending():
                    await stream.write(last)
            except ConnectionResetError:
                raise
            except Exception as error:
                if not stream.has_begun:
                    raise
                stream.response.outcome = status_of(error)
                await stream.write(self._error_frame(error))
        return stream.response

    def _pairs(self) -> Iterator[tuple[Generation, Completion]]:
        return zip(self.generations, self.completions, strict=True)

    async def _read(self, generation: Generation, completion: Completion) -> None:
        async for event in generation:
            completion.push(event)
            if completion.finish:
                generation.close()
                return
        raise GenerationFailed("the generation ended without its last token")

    async def _pump(
        self,
        generation: Generation,
        completion: Completion,
        stream: EventStream,
        frames: Callable[[Token], bytes],
    ) -> None:
        async for event in generation:
            data = frames(completion.push(event))
            if data:
                await stream.write(data)
            if completion.finish:
                generation.close()
                return
        raise GenerationFailed("the generation ended without its last token")

    def _error_frame(self, error: Exception) -> bytes:
        openai = is_openai(self.request)
        start = "data: " if openai else "data:"
        return f"{start}{to_json(to_object(error, openai=openai))}\n\n".encode()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        metrics = self.request.app[SERVICE].metrics
        metrics.prompt_tokens.observe(self.prompt_tokens)
        try:
            yield
        finally:
            metrics.queue.observe(self._queue_seconds())
            metrics.generated_tokens.observe(self.generated_tokens)
            self.request.app[SERVICE].engine.activity.served(self.adapter, self._served())

    def _served(self) -> Served:
        first = self._first_token_at()
        return Served(
            self.prompt_tokens,
            self.generated_tokens,
            self._queue_seconds(),
            first - self.clock.received_at if first else None,
        )

    def _first_token_at(self) -> float:
        """When the first token of any sequence came; 0 before that."""
        return min((c.first_token_at for c in self.completions if c.first_token_at), default=0.0)

    def _queue_seconds(self) -> float:
        return max(generation.queue_seconds for generation in self.generations)

    def _headers_at_start(self) -> dict[str, str]:
        """What is known when a stream begins; times in milliseconds."""
        headers = {
            **self.headers,
            "x-prompt-tokens": str(self.prompt_tokens),
            "x-validation-time": _ms(self.clock.validation_seconds),
            "x-queue-time": _ms(self._queue_seconds()),
        }
        if first := self._first_token_at():
            headers["x-time-to-first-token"] = _ms(first - self.clock.received_at)
        return headers

    def _headers_at_end(self) -> dict[str, str]:
        total = perf_counter() - self.clock.received_at
        waiting = self._queue_seconds() + self.clock.validation_seconds
        inference, generated = max(0.0, total - waiting), self.generated_tokens
        return self._headers_at_start() | {
            "x-total-time": _ms(total),
            "x-inference-time": _ms(inference),
            "x-time-per-token": _ms(inference / generated),
            "x-generated-tokens": str(generated),
            "x-total-tokens": str(self.prompt_tokens + generated),
        }


def served_by(model_id: str, adapter: AdapterKey | None) -> dict[str, str]:
    """Headers naming model and adapter; percent-encoded where a header cannot hold them."""
    headers = {"x-model-id": quote(model_id, _SAFE)}
    if adapter is not None:
        headers["x-adapter-id"] = quote(str(adapter), _SAFE)
        headers["x-adapter-source"] = adapter.source
    return headers


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3f}"


async def _all(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Awaits all calls at once; the first error cancels the others and is raised as itself."""
    first, *others = calls
    if not others:
        await first
        return
    try:
        async with asyncio.TaskGroup() as group:
            for call in (first, *others):
                group.create_task(call)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
