"""Processes that do for the router what could take too long, or too much, in its own."""

from __future__ import annotations

import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from contextlib import suppress


async def start(module: str) -> Process:
    """Runs a module with pipes for stdin and stdout.

    It sees nothing of this process's environment, which may hold secrets.
    """
    return await create_subprocess_exec(
        sys.executable, "-P", "-m", module, stdin=PIPE, stdout=PIPE, env={"PYTHONUTF8": "1"}
    )


async def kill(process: Process) -> None:
    """Ends it, if it has not ended."""
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
