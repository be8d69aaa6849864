"""One sequence's tokens as text, with its stop strings, end and times."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

from lorafleet.router.detokenizer import Detokenizer
from lorafleet.router.metrics import Metrics
from lorafleet.router.request import FinishReason, TokenEvent
from lorafleet.router.stops import StopStrings


class Token(NamedTuple):
    """A generated token and the text it added to the completion."""

    event: TokenEvent
    text: str


class Completion:
    """What a generation has said so far; `finish` is set once nothing more will be said.

    Times are of `perf_counter`; 0 = not yet.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: StopStrings, metrics: Metrics, received_at: float
    ) -> None:
        self.tokens: list[Token] = []
        self.finish: FinishReason | None = None
        self.first_token_at = 0.0
        self.last_token_at = received_at
        self._detokenizer = detokenizer
        self._stops = stops
        self._metrics = metrics

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(token.text for token in self.tokens)

    @property
    def mean_logprob(self) -> float:
        """By which best_of chooses."""
        return sum(token.event.logprob for token in self.tokens) / len(self.tokens)

    def push(self, event: TokenEvent) -> Token:
        """Takes the next token; it adds no text while a character or a stop string may go on."""
        self._note_time()
        finish = event.finish
        step = "" if finish is FinishReason.EOS_TOKEN else self._detokenizer.step(event.token_id)
        text = self._stops.push(step)
        if finish and not self._stops.found:
            text += self._stops.push(self._detokenizer.flush())
        if self._stops.found:
            finish = FinishReason.STOP_SEQUENCE
        elif finish:
            text += self._stops.flush()
        self.finish = finish
        token = Token(event, text)
        self.tokens.append(token)
        return token

    def _note_time(self) -> None:
        now = perf_counter()
        elapsed = now - self.last_token_at
        if self.first_token_at:
            self._metrics.inter_token.observe(elapsed)
        else:
            self.first_token_at = now
            self._metrics.first_token.observe(elapsed)
        self.last_token_at = now
