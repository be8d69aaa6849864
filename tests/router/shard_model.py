"""ShardModel: executes plans in pure Python and asserts everything the contract promises a shard.

KV is modelled exactly: a position's cell holds the adapter, and the whole token history up to it.
A row may sample only if its page table shows its own history at every position, so a page shared
wrongly, freed early or written twice is found where it would have done harm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorafleet.proto.messages import AdapterKey, SamplingParams, ShardInfo, StepPlan, StepResult
from tests.fake_model import FakeModel, fake_logprob

Cell = tuple[AdapterKey | None, tuple[int, ...]]


@dataclass(slots=True)
class ModelRow:
    """One row: its sequence so far and its page table."""

    tokens: list[int]
    num_start: int
    num_prompt: int
    sampling: SamplingParams
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0


@dataclass(slots=True)
class ModelSlot:
    """One bound slot."""

    key: AdapterKey
    extents: list[tuple[int, int]]  # start, stop
    is_ready: bool = False


class ShardModel:
    """One rank. `sizes` gives packed bytes per adapter; a move is ready one step later."""

    def __init__(self, info: ShardInfo, model: FakeModel, sizes: dict[AdapterKey, int]) -> None:
        self.info = info
        self.model = model
        self.sizes = sizes
        self.rows: dict[int, ModelRow] = {}
        self.slots: dict[int, ModelSlot] = {}
        self.cells: dict[int, dict[int, Cell]] = {page: {} for page in range(info.num_pages)}
        self.num_moves = 0
        self._moving: list[int] = []
        self._last_step = 0

    def step(self, plan: StepPlan) -> StepResult:
        """Executes one plan."""
        self._last_step += 1
        assert plan.step == self._last_step
        self._check_columns(plan)
        for start in plan.starts:
            assert 0 <= start.row < self.info.max_rows
            assert start.token_ids
            self.rows[start.row] = ModelRow(
                list(start.token_ids), len(start.token_ids), start.num_prompt_tokens, start.sampling
            )
        self._begin_moves(plan)
        result = StepResult(plan.step, ready_slots=self._take_ready(plan))
        self._grow(plan)
        self._write(plan)
        for index in range(len(plan.rows)):
            self._sample(plan, index, result)
        return result

    def _check_columns(self, plan: StepPlan) -> None:
        columns = (
            plan.first_positions, plan.token_counts, plan.slots, plan.samples,
            plan.new_page_counts,
        )  # fmt: skip
        assert all(len(column) == len(plan.rows) for column in columns)
        assert len(set(plan.rows)) == len(plan.rows), "a row is named twice"
        assert sum(plan.token_counts) <= self.info.max_step_tokens
        assert sum(plan.new_page_counts) == len(plan.pages)
        assert {start.row for start in plan.starts} <= set(plan.rows)
        for part in (plan.slots[: plan.num_prefills], plan.slots[plan.num_prefills :]):
            assert part == sorted(part), "rows are not grouped by slot"
        assert all(count == 1 for count in plan.token_counts[plan.num_prefills :])
        assert all(count >= 1 for count in plan.token_counts)

    def _begin_moves(self, plan: StepPlan) -> None:
        for move in plan.moves:
            self.num_moves += 1
            assert 1 <= move.slot <= self.info.num_slots
            assert move.slot not in plan.slots, "a slot is used in the step that loads it"
            extents = list(zip(move.extent_offsets, move.extent_bytes, strict=True))
            unit = self.info.arena_alignment
            assert all(offset % unit == size % unit == 0 for offset, size in extents)
            assert sum(size for _, size in extents) >= self.sizes[move.key]
            assert all(offset + size <= self.info.arena_bytes for offset, size in extents)
            taken = ModelSlot(move.key, [(offset, offset + size) for offset, size in extents])
            self.slots.pop(move.slot, None)
            for number, other in list(self.slots.items()):
                if _overlap(other.extents, taken.extents):
                    assert other.is_ready, "bytes are taken while they are being copied to"
                    del self.slots[number]  # overwritten: no row may use it again
            self.slots[move.slot] = taken

    def _take_ready(self, plan: StepPlan) -> list[int]:
        ready, self._moving = self._moving, [move.slot for move in plan.moves]
        if not plan.rows:
            ready, self._moving = ready + self._moving, []
        for number in ready:
            self.slots[number].is_ready = True
        return ready

    def _grow(self, plan: StepPlan) -> None:
        at = 0
        for row, count in zip(plan.rows, plan.new_page_counts, strict=True):
            self.rows[row].pages += plan.pages[at : at + count]
            at += count

    def _write(self, plan: StepPlan) -> None:
        """Every row writes its positions' cells, before any row reads."""
        written: dict[int, int] = {}
        for index, number in enumerate(plan.rows):
            row, first = self.rows[number], plan.first_positions[index]
            end = first + plan.token_counts[index]
            is_prefill = index < plan.num_prefills
            assert is_prefill == (first < row.num_start), "a row is in the wrong part"
            assert end <= (row.num_start if is_prefill else len(row.tokens))
            assert end <= self.info.max_model_len
            # A new row may begin after a shared prefix; any other continues where it was.
            assert first == row.num_computed or row.num_computed == 0
            row.num_computed = end
            adapter = self._adapter(plan.slots[index])
            for position in range(first, end):
                page, offset = self._cell_of(row, position)
                assert written.setdefault(page, number) == number, "two rows write one page"
                self.cells[page][offset] = (adapter, tuple(row.tokens[: position + 1]))
        for number in plan.rows:
            others = {page for page in self.rows[number].pages if written.get(page) != number}
            assert others.isdisjoint(written), "a page is read and written in one step"

    def _sample(self, plan: StepPlan, index: int, result: StepResult) -> None:
        row, first = self.rows[plan.rows[index]], plan.first_positions[index]
        end = first + plan.token_counts[index]
        adapter = self._adapter(plan.slots[index])
        for position in range(end):
            page, offset = self._cell_of(row, position)
            expected = (adapter, tuple(row.tokens[: position + 1]))
            assert self.cells[page].get(offset) == expected, "KV of another history"
        prompt = row.tokens[: row.num_prompt]
        if row.sampling.prompt_logprobs:
            result.prompt_logprobs += map(fake_logprob, prompt[first + 1 : end + 1])
        assert plan.samples[index] == (end == len(row.tokens))
        if plan.samples[index]:
            token = self.model.next_token(prompt, row.tokens[-1], end, adapter)
            row.tokens.append(token)
            result.tokens.append(token)
            result.logprobs.append(fake_logprob(token))
            for rank in range(row.sampling.num_top_logprobs):
                result.top_ids.append(token + rank)
                result.top_logprobs.append(fake_logprob(token) - rank)

    def _cell_of(self, row: ModelRow, position: int) -> tuple[int, int]:
        size = self.info.page_size
        assert position // size < len(row.pages), "a position has no page"
        return row.pages[position // size], position % size

    def _adapter(self, number: int) -> AdapterKey | None:
        if number == 0:
            return None
        assert self.slots[number].is_ready, "a slot is used before its copy is reported"
        return self.slots[number].key


def _overlap(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(a < stop and start < b for a, b in some for start, stop in others)
