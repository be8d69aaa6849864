"""What scheduler tests share: infos, adapters and a driver with plans in flight."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from lorafleet.proto.messages import (
    AdapterInfo,
    AdapterKey,
    SamplingParams,
    ShardInfo,
    StepPlan,
    Tier,
)
from lorafleet.router.adapter import Adapter
from lorafleet.router.errors import RequestError
from lorafleet.router.request import GenerationRequest, TokenEvent
from lorafleet.router.scheduler import Scheduler, SchedulerLimits
from lorafleet.router.sequence import Sequence, Status
from tests.fake_model import FakeModel
from tests.fakes import FakeConfig
from tests.router.shard_model import ShardModel

UNIT = 256  # arena alignment, bytes


def make_info(**sizes: Any) -> ShardInfo:
    """A small group: 4-token pages unless said otherwise."""
    defaults = {"page_size": 4, "num_pages": 32, "max_rows": 4, "max_step_tokens": 16}
    return replace(FakeConfig().info(), **(defaults | sizes))


def make_adapter(name: str, units: int = 1, piece_units: int = 0) -> Adapter:
    """An adapter of `units` arena units, in host memory; `piece_units` 0 = all of one piece."""
    key = AdapterKey("local", name)
    info = AdapterInfo(
        key, f"digest of {name}", 8, units * UNIT, 0, ["q_proj"], Tier.HOST, piece_units * UNIT
    )
    adapter = Adapter(info, on_unpinned=lambda: None)
    adapter.in_host = True
    return adapter


def make_request(
    prompt: list[int],
    max_new_tokens: int = 4,
    *,
    salt: str = "",
    priority: int = 0,
    **sampling: Any,
) -> GenerationRequest:
    """A greedy request."""
    return GenerationRequest(
        prompt, SamplingParams(**sampling), max_new_tokens, cache_salt=salt, priority=priority
    )


@dataclass
class Driver:
    """A scheduler against a shard model, `run_ahead` plans sent before the oldest is answered."""

    info: ShardInfo
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    model: FakeModel = field(default_factory=FakeModel)
    adapters: list[Adapter] = field(default_factory=list)
    run_ahead: int = 1

    def __post_init__(self) -> None:
        sizes = {adapter.key: adapter.nbytes for adapter in self.adapters}
        self.scheduler = Scheduler(self.info, self.limits)
        self.shard = ShardModel(self.info, self.model, sizes)
        self.plans: list[StepPlan] = []
        self.events: dict[Sequence, list[TokenEvent]] = {}
        self.errors: dict[Sequence, RequestError] = {}
        self.now = 0.0
        self._in_flight: deque[StepPlan] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, runs or is on its way."""
        scheduler = self.scheduler
        return not (scheduler.waiting or len(scheduler.running) or self._in_flight)

    def submit(self, request: GenerationRequest, adapter: Adapter | None = None) -> Sequence:
        """A new sequence, later than all before."""
        sequence = Sequence(len(self.events), request, adapter, self.now)
        self.events[sequence] = []
        self.scheduler.submit(sequence)
        return sequence

    def turn(self) -> None:
        """One turn of the engine's loop: send what can be sent, take one result."""
        self.now += 1.0
        while len(self._in_flight) <= self.run_ahead:
            num_preemptions = self.scheduler.num_preemptions
            plan = self.scheduler.plan(self.now)
            if self.scheduler.num_preemptions == num_preemptions:
                self._check_work_conserved(plan)
            if plan is None:
                break
            self.plans.append(plan)
            self._in_flight.append(plan)
            self._check_lengths()
        if self._in_flight:
            result = self.shard.step(self._in_flight.popleft())
            for sequence, event in self.scheduler.apply(result, self.now):
                if isinstance(event, TokenEvent):
                    self.events[sequence].append(event)
                else:
                    self.errors[sequence] = event
        else:
            assert not self.scheduler.waiting, "sequences wait and nothing is in flight"
        self.scheduler.check()

    def finish(self, max_turns: int = 1000) -> None:
        """Turns until idle, which must come within `max_turns`."""
        for _ in range(max_turns):
            if self.is_idle:
                break
            self.turn()
        assert self.is_idle, "starvation"
        assert self.scheduler.kv.pages.num_used == 0

    def _check_work_conserved(self, plan: StepPlan | None) -> None:
        """No row, page and budget is left over while somebody who could start waits."""
        scheduler, limits = self.scheduler, self.limits
        num_tokens = sum(plan.token_counts) if plan is not None else 0
        if num_tokens == self.info.max_step_tokens or not scheduler.running.has_row:
            return
        pages, margin = scheduler.kv.pages, len(scheduler.running) // 2
        available = pages.num_free + pages.num_idle - margin
        if any(s.overtaken >= limits.max_overtakes for s in scheduler.waiting):
            return  # one without a slot has been passed often enough
        for line in scheduler.waiting.lines:
            head, adapter = line.sequences[0], line.adapter
            is_ready = adapter is None or scheduler.device.is_ready(adapter)
            is_limited = 0 < limits.max_running <= scheduler.running.count(adapter)
            fits = scheduler.kv.pages_for(len(head.tokens)) <= available
            may_start = is_ready and fits and not is_limited and not head.num_in_flight
            # An earlier turn may wait for more pages than this one needs.
            assert not may_start or any(
                scheduler.kv.pages_for(len(other.tokens)) > available for other in scheduler.waiting
            ), "a row is idle while a sequence could have it"

    def computed(self, adapter: Adapter | None) -> int:
        """Positions computed for an adapter's sequences, each counted once."""
        ends = (
            len(sequence.tokens) - 1
            if sequence.status is Status.DONE
            else max(sequence.num_planned, sequence.num_paid)
            for sequence in self.events
            if sequence.adapter is adapter
        )
        return sum(ends)

    def _check_lengths(self) -> None:
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            assert len(sequence.tokens) + sequence.num_in_flight <= sequence.max_tokens

    def tokens(self, sequence: Sequence) -> list[int]:
        """What the sequence's client has received."""
        return [event.token_id for event in self.events[sequence]]

    def expected(self, sequence: Sequence) -> list[int]:
        """What it gets when it runs alone."""
        request = sequence.request
        key = sequence.adapter.key if sequence.adapter else None
        return self.model.expected_tokens(request.prompt_ids, request.max_new_tokens, key)
