"""TemplateRenderer: chat templates of adapters, rendered in processes that may be killed."""

from __future__ import annotations

import asyncio
import json
import time
from asyncio.subprocess import Process
from hashlib import sha256
from typing import Any

from lorafleet.router.chat import TemplateFailed
from lorafleet.router.child_process import kill, start
from lorafleet.router.template_process import LENGTH_BYTES

_MODULE = "lorafleet.router.template_process"
_SECONDS = 5.0  # for one rendering; templates take milliseconds
_REST_SECONDS = 60.0  # in which a template that took longer is not tried again
_LONG_BYTES = 1 << 16  # of messages that may be to blame themselves for the time they take


class TemplateRenderer:
    """Owns the processes, which are started when they are first needed and used again.

    A template that takes too long would keep the others waiting with each request for it, so it is
    refused for a while; after messages that were long, so are only such.
    """

    def __init__(self, num_processes: int, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._places = asyncio.Semaphore(num_processes)
        self._idle: list[Process] = []
        # Until when, by the template's digest and whether messages are long; those that rest now.
        self._resting: dict[tuple[bytes, bool], float] = {}

    async def render(self, config: dict[str, Any], messages: list[dict[str, Any]]) -> str:
        """The prompt by a tokenizer configuration's template. Raises TemplateFailed."""
        template, said = json.dumps(config), json.dumps(messages)
        kind = sha256(template.encode()).digest(), len(said) > _LONG_BYTES
        data = f'{{"config": {template}, "messages": {said}}}'.encode()
        async with self._places:
            self._check_rests_not(kind)
            process = self._idle.pop() if self._idle else await _start()
            try:
                async with asyncio.timeout(self._seconds):
                    answer = await _ask(process, data)
            except TimeoutError:
                await kill(process)
                self._resting[kind] = time.monotonic() + _REST_SECONDS
                raise _failed(f"the chat template takes more than {self._seconds:g} s") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                await kill(process)
                raise _failed("the chat template takes too much memory or time") from None
            except BaseException:
                await kill(process)
                raise
            self._idle.append(process)
        if "error" in answer:
            raise _failed(answer["error"])
        return answer["text"]

    def _check_rests_not(self, kind: tuple[bytes, bool]) -> None:
        now = time.monotonic()
        self._resting = {k: until for k, until in self._resting.items() if until > now}
        if kind in self._resting:
            raise _failed(f"the chat template took more than {self._seconds:g} s a short time ago")

    async def close(self) -> None:
        """Ends the processes that rest; the others end with the requests they work for."""
        while self._idle:
            await kill(self._idle.pop())


async def _start() -> Process:
    process = await start(_MODULE)
    try:
        await _read(process)  # its imports are not the template's time
    except BaseException:
        await kill(process)
        raise
    return process


async def _ask(process: Process, data: bytes) -> dict[str, str]:
    assert process.stdin is not None
    process.stdin.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    await process.stdin.drain()
    return await _read(process)


async def _read(process: Process) -> dict[str, str]:
    assert process.stdout is not None
    head = await process.stdout.readexactly(LENGTH_BYTES)
    answer: dict[str, str] = json.loads(
        await process.stdout.readexactly(int.from_bytes(head, "little"))
    )
    return answer


def _failed(reason: str) -> TemplateFailed:
    return TemplateFailed(reason, "messages")
