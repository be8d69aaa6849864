"""StepStream: one router's hold on this rank, from the opening of its stream to its end."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue

from lorafleet.proto.messages import StepResult


class StepStream:
    """Carries results from the compute thread to the RPC thread; a newer stream fences it off."""

    def __init__(self) -> None:
        self.is_open = True
        self.is_fenced = False
        self._results: SimpleQueue[StepResult | None] = SimpleQueue()

    def answer(self, result: StepResult) -> None:
        """Queues a result for the router."""
        self._results.put(result)

    def close(self, *, fenced: bool = False) -> None:
        """Ends the stream: its plans are void from now on, and `results` stops."""
        self.is_open = False
        self.is_fenced |= fenced
        self._results.put(None)

    def results(self) -> Iterator[StepResult]:
        """Results in order, until the stream is closed."""
        return iter(self._results.get, None)
