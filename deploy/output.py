"""Output whose reader may leave, as `head` does: the command ends, and says nothing of it."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from rich.console import Console

NO_READER = 128 + signal.SIGPIPE  # what a shell says of a program that the signal ended


def leave() -> NoReturn:
    """For a BrokenPipeError: raises SystemExit with NO_READER, which ends an event loop, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    raise SystemExit(NO_READER)


class Output(Console):
    """A console that leaves with NO_READER; rich's leaves with 1, our code for a refusal."""

    def on_broken_pipe(self) -> None:
        """See Console."""
        self.quiet = True  # children are still to be stopped, and may have something to say
        leave()
