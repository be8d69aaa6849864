"""The deterministic function a fake shard computes, and a step of it over rows.

A sequence's next token depends on its last token, the new token's position and its adapter, never
on its row, slot, pages or batch mates. So `expected_tokens` says what any request must return.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from lorafleet.proto.messages import AdapterKey, SamplingParams, SequenceStart, StepPlan, StepResult

EOS_ID = 2
FIRST_TEXT_ID = 3  # 0 <pad>, 1 <s>, 2 </s>, then printable ASCII, then the other bytes
NUM_TEXT_IDS = 95  # ids the formula draws from


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Next token = FIRST_TEXT_ID + (31 last + 17 position + 7 adapter) % 95, unless told otherwise.

    echo: the completion repeats the prompt instead, so a test chooses the text it gets.
    eos_after: the generated token of this number is EOS_ID; 0 = never.
    poison_id: a sequence whose last known prompt token is this id has non-finite logits.
    """

    echo: bool = False
    eos_after: int = 0
    poison_id: int = -1

    def next_token(
        self, prompt: list[int], last: int, position: int, adapter: AdapterKey | None
    ) -> int:
        """The token at `position`, after `last`; -1 for a poisoned prompt."""
        if prompt[-1] == self.poison_id:
            return -1
        if self.eos_after and position - len(prompt) + 1 >= self.eos_after:
            return EOS_ID
        if self.echo:
            return prompt[(position - len(prompt)) % len(prompt)]
        return (
            FIRST_TEXT_ID + (31 * last + 17 * position + 7 * adapter_number(adapter)) % NUM_TEXT_IDS
        )

    def expected_tokens(
        self, prompt: list[int], count: int, adapter: AdapterKey | None = None
    ) -> list[int]:
        """The first `count` generated tokens, fewer when EOS_ID comes first (it is the last)."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            tokens.append(self.next_token(prompt, tokens[-1], len(tokens), adapter))
            if tokens[-1] == EOS_ID:
                break
        return tokens[len(prompt) :]


def adapter_number(key: AdapterKey | None) -> int:
    """What distinguishes an adapter's tokens; 0 for the base model."""
    return 0 if key is None else 1 + zlib.crc32(f"{key.source}:{key}".encode()) % 94


def fake_logprob(token: int) -> float:
    """The log-probability a fake shard reports for a token; exact in float32."""
    return -((token % 7) + 1) / 8


@dataclass(slots=True)
class FakeRow:
    """One row's sequence so far."""

    tokens: list[int]
    prompt: list[int]
    sampling: SamplingParams


@dataclass(slots=True)
class FakeRows:
    """The rows and slots of one step stream."""

    model: FakeModel
    rows: dict[int, FakeRow] = field(default_factory=dict)
    slots: dict[int, AdapterKey | None] = field(default_factory=lambda: {0: None})
    moving: list[int] = field(default_factory=list)

    def step(self, plan: StepPlan) -> StepResult:
        """Runs a plan. A move is reported ready at the next step, or at once without rows."""
        result = StepResult(plan.step)
        for start in plan.starts:
            self._start(start)
        ready, self.moving = self.moving, [move.slot for move in plan.moves]
        self.slots.update((move.slot, move.key) for move in plan.moves)
        if not plan.rows:
            ready, self.moving = ready + self.moving, []
        result.ready_slots = ready
        for index in range(len(plan.rows)):
            self._compute(plan, index, result)
        return result

    def _start(self, start: SequenceStart) -> None:
        prompt = start.token_ids[: start.num_prompt_tokens]
        self.rows[start.row] = FakeRow(list(start.token_ids), prompt, start.sampling)

    def _compute(self, plan: StepPlan, index: int, result: StepResult) -> None:
        row, first = self.rows[plan.rows[index]], plan.first_positions[index]
        end = first + plan.token_counts[index]
        if row.sampling.prompt_logprobs:
            asked = row.prompt[first + 1 : end + 1]
            result.prompt_logprobs += map(fake_logprob, asked)
        if not plan.samples[index]:
            return
        if end != len(row.tokens):
            raise ValueError(f"row samples position {end} but holds {len(row.tokens)} tokens")
        adapter = self.slots[plan.slots[index]]
        token = self.model.next_token(row.prompt, row.tokens[-1], end, adapter)
        row.tokens.append(token)
        result.tokens.append(token)
        result.logprobs.append(fake_logprob(token))
        for rank in range(row.sampling.num_top_logprobs):
            result.top_ids.append(token + rank)
            result.top_logprobs.append(fake_logprob(token) - rank)
