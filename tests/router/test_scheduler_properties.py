"""Random arrivals, cancels and tiny budgets against the exact shard model."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.router.request import FinishReason
from lorafleet.router.scheduler import SchedulerLimits
from lorafleet.router.sequence import Sequence
from tests.fake_model import EOS_ID, FakeModel
from tests.router.helpers import UNIT, Driver, make_adapter, make_info, make_request

ADAPTER_UNITS = [1, 1, 2, 3, 5, 8]
PIECE_UNITS = [0, 1, 1, 2, 1, 3]  # of the largest piece, 0 = all


@dataclass(frozen=True)
class Arrival:
    """A request, when it comes and when its client leaves."""

    turn: int
    prompt: list[int]
    max_new_tokens: int
    adapter: int  # index into ADAPTER_UNITS, -1 = base
    salt: str
    prompt_logprobs: bool
    leaves_after: int  # turns, 0 = stays
    priority: int


STEMS: list[list[int]] = [[], [7] * 9, [7] * 17, [*range(10, 26)]]


def make_arrivals(seed: int, count: int, window: int) -> list[Arrival]:
    """`count` requests within `window` turns; prompts often share a beginning."""
    random = Random(seed)
    return [
        Arrival(
            turn=random.randint(0, window),
            prompt=random.choice(STEMS) + random.choices(range(3, 7), k=random.randint(1, 12)),
            max_new_tokens=random.randint(1, 16),
            adapter=random.randint(-1, len(ADAPTER_UNITS) - 1),
            salt=random.choice(["", "", "other"]),
            prompt_logprobs=random.random() < 0.2,
            leaves_after=random.choice([0, 0, 0, 0, random.randint(1, 20)]),
            priority=random.choice([0, 0, 0, -3, 2]),
        )
        for _ in range(count)
    ]


@settings(max_examples=200, deadline=None)
@given(
    arrivals=st.builds(
        make_arrivals, st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([0, 5, 40])
    ),
    page_size=st.sampled_from([1, 2, 4]),
    spare_pages=st.integers(0, 12),
    max_rows=st.integers(1, 8),
    max_step_tokens=st.integers(1, 24),
    num_slots=st.integers(1, 4),
    arena_units=st.integers(max(ADAPTER_UNITS), 12),
    chunk_tokens=st.integers(0, 7),
    max_overtakes=st.integers(1, 4),
    max_running=st.integers(0, 3),
    quantum_tokens=st.sampled_from([1, 16, 1024]),
    run_ahead=st.integers(0, 1),
    prefix_caching=st.booleans(),
    eos_after=st.integers(0, 12),
)
def test_every_sequence_gets_its_own_tokens_and_leaves_nothing(
    arrivals: list[Arrival],
    page_size: int,
    spare_pages: int,
    max_rows: int,
    max_step_tokens: int,
    num_slots: int,
    arena_units: int,
    chunk_tokens: int,
    max_overtakes: int,
    max_running: int,
    quantum_tokens: int,
    run_ahead: int,
    prefix_caching: bool,
    eos_after: int,
) -> None:
    longest = max(len(arrival.prompt) + arrival.max_new_tokens - 1 for arrival in arrivals)
    info = make_info(
        page_size=page_size,
        num_pages=-(-longest // page_size) + spare_pages,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        num_slots=num_slots,
        arena_bytes=arena_units * UNIT + 100,
    )
    adapters = [
        make_adapter(f"adapter-{i}", units, piece)
        for i, (units, piece) in enumerate(zip(ADAPTER_UNITS, PIECE_UNITS, strict=True))
    ]
    driver = Driver(
        info,
        SchedulerLimits(
            chunk_tokens, prefix_caching, max_overtakes, max_running, quantum_tokens, 4.0
        ),
        FakeModel(eos_after=eos_after),
        adapters,
        run_ahead,
    )
    sequences = play(driver, arrivals)
    for arrival, sequence in sequences:
        assert sequence.overtaken <= max_overtakes
        events, expected = driver.events[sequence], driver.expected(sequence)
        finished = bool(events) and events[-1].finish is not None
        assert driver.tokens(sequence) == expected[: len(events)]
        if arrival.leaves_after == 0 or finished:
            assert len(events) == len(expected)
            is_eos = expected[-1] == EOS_ID
            reason = FinishReason.EOS_TOKEN if is_eos else FinishReason.LENGTH
            assert events[-1].finish is reason
            if arrival.prompt_logprobs:
                values = [-((token % 7) + 1) / 8 for token in arrival.prompt[1:]]
                assert sequence.prompt_logprobs == values
    assert not driver.errors
    assert all(adapter.num_pins == 0 for adapter in adapters)


def play(driver: Driver, arrivals: list[Arrival]) -> list[tuple[Arrival, Sequence]]:
    """Runs every arrival to its end, within a bound on turns that rules out starvation."""
    waiting = sorted(arrivals, key=lambda arrival: arrival.turn)
    sequences, leaving = [], []
    # Alone, a sequence takes at most a turn per token, four for its adapter, and the run-ahead.
    alone = sum(len(a.prompt) + a.max_new_tokens + 8 for a in arrivals)
    for turn in range(60 + 4 * alone):
        while waiting and waiting[0].turn <= turn:
            arrival = waiting.pop(0)
            request = make_request(
                arrival.prompt,
                arrival.max_new_tokens,
                salt=arrival.salt,
                priority=arrival.priority,
                prompt_logprobs=arrival.prompt_logprobs,
            )
            adapter = driver.adapters[arrival.adapter] if arrival.adapter >= 0 else None
            sequence = driver.submit(request, adapter)
            sequences.append((arrival, sequence))
            if arrival.leaves_after:
                leaving.append((turn + arrival.leaves_after, sequence))
        for when, sequence in leaving:
            if when == turn:
                driver.scheduler.abort(sequence)
        if not waiting and driver.is_idle:
            break
        driver.turn()
    assert driver.is_idle, "starvation"
    assert driver.scheduler.kv.pages.num_used == 0
    # Copies begun for sequences that were cancelled are waited for.
    while driver.scheduler.device.num_loading:
        driver.turn()
    return sequences
