"""Stop strings found in text as it grows, also when they straddle tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feeds text through until a stop string is complete; `found` then says so.

    Of several stop strings the one complete first wins, and of those the longest. Without
    `keep` the stop string is cut off, so text that may be the beginning of one is held back.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self._stops = tuple(stops)
        self._keep = keep
        self._longest = max(map(len, stops), default=0)
        self._text = ""  # keep: the last characters passed on; otherwise: the characters held
        self.found = False

    def push(self, new: str) -> str:
        """The text that may be passed on now that `new` has come."""
        if not self._longest:
            return new
        text = self._text + new
        match = self._first_match(text)
        if match is not None:
            start, end = match
            self.found = True
            passed = text[len(self._text) : end] if self._keep else text[:start]
            self._text = ""
            return passed
        if self._keep:
            self._text = text[1 - self._longest :] if self._longest > 1 else ""
            return new
        held = self._num_held(text)
        self._text = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, now that nothing more comes."""
        held, self._text = self._text, ""
        return "" if self._keep else held

    def _first_match(self, text: str) -> tuple[int, int] | None:
        """Where the stop string that is complete first stands, as (start, end)."""
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stops):
                return length
        return 0
