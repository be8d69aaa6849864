"""Screen: what the operator sees while the fleet runs: the children's logs, notes, loading."""

from __future__ import annotations

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from lorafleet.deploy.output import Output

PLAIN_STEPS = 4  # without a terminal, progress is this many lines


class Screen:
    """Standard error: a progress bar on a terminal, plain lines anywhere else."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Output(stderr=True, soft_wrap=True)
        self._bar: Progress | None = None
        self._steps = 0

    def log(self, name: str, line: str) -> None:
        """A line a child wrote."""
        self.note(f"[{name}] {line}")

    def note(self, text: str) -> None:
        """A line of the launcher's own."""
        self._console.print(text, markup=False, highlight=False, emoji=False)

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """How much of the weights rank 0 has read; `total_bytes` > 0."""
        if not self._console.is_terminal:
            self._loading_line(done_bytes, total_bytes)
            return
        if self._bar is None:
            self._bar = _bar(self._console)
            self._bar.add_task("weights", total=total_bytes, completed=done_bytes)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done_bytes, total=total_bytes)

    def loaded(self) -> None:
        """Takes the progress bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _loading_line(self, done_bytes: int, total_bytes: int) -> None:
        steps = PLAIN_STEPS * done_bytes // total_bytes
        if steps > self._steps:
            self._steps = steps
            self.note(f"loading weights: {done_bytes / total_bytes:.0%} of {decimal(total_bytes)}")


def _bar(console: Console) -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    return Progress("Loading weights", *columns, console=console, transient=True)
