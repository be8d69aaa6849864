"""Child: one process the launcher started, its events, its last words and its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from lorafleet.proto.lifeline import PARENT_PIPE

KEPT_LINES = 50
MAX_LINE_BYTES = 1 << 16
DRAIN_SECONDS = 1.0  # after an exit: a grandchild may hold the pipes open for good

OnEvent = Callable[["Child", dict[str, Any]], None]
OnLog = Callable[[str, str], None]  # (child's name, line)

STDOUT, STDERR = 1, 2
_LINE_END = re.compile(rb"[\r\n]+")


class Child(asyncio.SubprocessProtocol):
    """A running process in a session of its own, tied to this one by its standard input.

    JSON objects on its standard output are events; every other line is a log line. `exited`
    resolves to the return code once the last of its output has been read.
    """

    def __init__(self, name: str, on_event: OnEvent, on_log: OnLog) -> None:
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._on_event = on_event
        self._on_log = on_log
        self._partial = {STDOUT: b"", STDERR: b""}
        self._open = {STDOUT, STDERR}
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_event: OnEvent,
        on_log: OnLog,
    ) -> Child:
        """Starts `command` with `environment` on top of this process's own."""
        _, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(name, on_event, on_log),
            *command,
            env={**os.environ, **environment, PARENT_PIPE: "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches the launcher only, which decides the order
        )
        return child

    def terminate(self) -> None:
        """Asks the process to finish (SIGTERM); nothing once it is gone."""
        if self._transport is not None and not self.exited.done():
            with suppress(ProcessLookupError):
                self._transport.terminate()

    def kill(self) -> None:
        """Ends the process and whatever it started (SIGKILL), if any of it is still there."""
        if self._transport is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._transport.get_pid(), signal.SIGKILL)

    def close(self) -> None:
        """Releases the pipes."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.SubprocessProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes | str) -> None:
        assert isinstance(data, bytes)
        *lines, rest = _LINE_END.split(self._partial[fd] + data)
        if len(rest) > MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._partial[fd] = rest
        for line in lines:
            self._take(fd, line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd in self._open:
            self._open.remove(fd)
            self._take(fd, self._partial[fd])
            self._settle()

    def process_exited(self) -> None:
        self._settle()
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._settle, True)

    def _settle(self, drained: bool = False) -> None:
        assert self._transport is not None
        code = self._transport.get_returncode()
        if code is not None and (drained or not self._open) and not self.exited.done():
            self.exited.set_result(code)

    def _take(self, fd: int, line: bytes) -> None:
        event = _event(line) if fd == STDOUT else None
        if event is not None:
            self._on_event(self, event)
        elif text := line.decode(errors="replace").rstrip():
            self.last_lines.append(text)
            self._on_log(self.name, text)


def how_it_ended(code: int) -> str:
    """A return code in words."""
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _event(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if "event" in event else None
