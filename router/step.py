"""Step: one plan being filled, and what is needed to read its result."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from lorafleet.proto.messages import StepPlan, StepResult
from lorafleet.router.sequence import Sequence


class Row(NamedTuple):
    """One row of a plan."""

    sequence: Sequence
    slot: int
    row: int
    first_position: int
    token_count: int
    samples: bool
    pages: list[int]  # new in this step


class Sample(NamedTuple):
    """What one sampling row returned."""

    sequence: Sequence
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


_by_slot = attrgetter("slot")


class Step:
    """Up to `budget` tokens of work."""

    def __init__(self, number: int, budget: int) -> None:
        self.plan = StepPlan(number)
        self.budget = budget  # tokens it can still take
        self._prefills: list[Row] = []
        self._decodes: list[Row] = []
        self._samplers: list[Sequence] = []  # in plan order
        self._prompt_chunks: list[tuple[Sequence, int, int]] = []  # sequence, first, num values

    @property
    def prefilled(self) -> list[Sequence]:
        """Sequences of its prefill rows."""
        return [row.sequence for row in self._prefills]

    @property
    def is_empty(self) -> bool:
        """Whether it computes and moves nothing."""
        return not (self._prefills or self._decodes or self.plan.moves)

    def add(self, sequence: Sequence, token_count: int, pages: list[int]) -> None:
        """The sequence's next `token_count` tokens; samples if they are its last known ones."""
        first = sequence.num_planned
        rows = self._prefills if sequence.is_prefilling else self._decodes
        end = sequence.num_planned = first + token_count
        samples = end == len(sequence.tokens) + sequence.num_in_flight
        sequence.num_in_flight += samples
        self.budget -= token_count
        rows.append(Row(sequence, sequence.slot, sequence.row, first, token_count, samples, pages))

    def start(self, sequence: Sequence) -> None:
        """A newly admitted sequence takes its row; its first chunk must follow."""
        self.plan.starts.append(sequence.start())

    def add_chunk(self, sequence: Sequence, max_chunk: int, pages: list[int]) -> None:
        """As many of the sequence's known tokens as chunk size and budget allow."""
        count = min(sequence.num_start - sequence.num_planned, max_chunk, self.budget)
        self.add(sequence, count, pages)

    def close(self) -> StepPlan:
        """Fills the plan's columns: prefills, then decodes, each grouped by slot."""
        rows = sorted(self._prefills, key=_by_slot) + sorted(self._decodes, key=_by_slot)
        self._samplers = [row.sequence for row in rows if row.samples]
        self._prompt_chunks = [
            (row.sequence, row.first_position, _num_prompt_logprobs(row))
            for row in rows
            if row.sequence.request.sampling.prompt_logprobs
        ]
        plan = self.plan
        plan.num_prefills = len(self._prefills)
        plan.rows = [row.row for row in rows]
        plan.first_positions = [row.first_position for row in rows]
        plan.token_counts = [row.token_count for row in rows]
        plan.slots = [row.slot for row in rows]
        plan.samples = [row.samples for row in rows]
        plan.new_page_counts = [len(row.pages) for row in rows]
        plan.pages = [page for row in rows for page in row.pages]
        return plan

    def read(self, result: StepResult) -> Iterator[Sample]:
        """Every sampling row's sample, after its sequences' prompt log-probabilities are noted."""
        assert result.step == self.plan.step, "results come in the order of plans"
        self._read_prompt_logprobs(result)
        start = 0
        for sequence, token, logprob in zip(
            self._samplers, result.tokens, result.logprobs, strict=True
        ):
            top: tuple[tuple[int, float], ...] = ()
            stop = start + sequence.request.sampling.num_top_logprobs
            if stop > start:
                ids, logprobs = result.top_ids[start:stop], result.top_logprobs[start:stop]
                top = tuple(zip(ids, logprobs, strict=True))
                start = stop
            sequence.num_in_flight -= 1
            yield Sample(sequence, token, logprob, top)

    def _read_prompt_logprobs(self, result: StepResult) -> None:
        start = 0
        for sequence, first, count in self._prompt_chunks:
            values = result.prompt_logprobs[start : start + count]
            start += count
            sequence.take_prompt_logprobs(first, values)


def _num_prompt_logprobs(row: Row) -> int:
    """Positions of the row whose next token is part of the prompt."""
    end = row.first_position + row.token_count
    return max(0, min(end, row.sequence.num_prompt - 1) - row.first_position)
