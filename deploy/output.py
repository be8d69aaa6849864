"""Output: a console whose reader may leave, as `head` does."""

from __future__ import annotations

from rich.console import Console


class Output(Console):
    """Raises BrokenPipeError where rich would end the process with 1, our code for a refusal."""

    def on_broken_pipe(self) -> None:
        """See Console."""
        raise BrokenPipeError
