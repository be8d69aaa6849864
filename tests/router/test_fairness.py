"""Fairness between adapters: shares, floods, priorities, limits; in steps, not seconds."""

from __future__ import annotations

from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lorafleet.router.adapter import Adapter
from lorafleet.router.scheduler import SchedulerLimits
from lorafleet.router.sequence import Sequence, Status
from lorafleet.router.waiting import WaitingQueue
from tests.router.helpers import Driver, make_adapter, make_info, make_request

QUANTUM = 32
PLENTY = 4096  # pages: what is tested is rows and budget


def prompt(random: Random, length: int) -> list[int]:
    return random.choices(range(3, 90), k=length)


def flood(driver: Driver, adapter: Adapter | None, count: int, length: int, new: int) -> None:
    """`count` equal requests at once."""
    random = Random(count)
    for _ in range(count):
        driver.submit(make_request(prompt(random, length), new), adapter)


def turns_until_done(driver: Driver, sequence: Sequence, limit: int = 2000) -> int:
    for turn in range(limit):
        if sequence.status is Status.DONE:
            return turn
        driver.turn()
    raise AssertionError("starvation")


@settings(max_examples=20, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    shapes=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=2, max_size=3),
    max_rows=st.integers(2, 6),
    max_step_tokens=st.integers(8, 40),
    chunk_tokens=st.sampled_from([0, 5]),
    run_ahead=st.integers(0, 1),
)
def test_backlogged_adapters_get_the_same_tokens_within_a_bound(
    seed: int,
    shapes: list[tuple[int, int]],
    max_rows: int,
    max_step_tokens: int,
    chunk_tokens: int,
    run_ahead: int,
) -> None:
    """Whatever their requests look like: long prompts here, long answers there."""
    random = Random(seed)
    owners = [None, *(make_adapter(f"a{i}") for i in range(len(shapes) - 1))]
    driver = Driver(
        make_info(max_rows=max_rows, max_step_tokens=max_step_tokens, num_pages=PLENTY),
        SchedulerLimits(chunk_tokens, prefix_caching=False, quantum_tokens=QUANTUM),
        adapters=[owner for owner in owners if owner],
        run_ahead=run_ahead,
    )

    def keep_backlogged() -> None:
        """More than a turn's plans can start."""
        for owner, (length, new) in zip(owners, shapes, strict=True):
            while driver.scheduler.waiting.count(owner) < 2 * max_rows:
                words = prompt(random, random.randint(1, length))
                driver.submit(make_request(words, random.randint(1, new)), owner)

    keep_backlogged()
    while not all(driver.computed(owner) for owner in owners):  # adapters are on their way
        driver.turn()
        keep_backlogged()
    before = [driver.computed(owner) for owner in owners]
    ahead = QUANTUM + max_step_tokens + max_rows * max(sum(shape) for shape in shapes)
    bound = 2 * ahead  # from being ahead to being behind
    for _ in range(12):
        for _ in range(12):
            driver.turn()
            keep_backlogged()
        gains = [
            driver.computed(owner) - start for owner, start in zip(owners, before, strict=True)
        ]
        assert max(gains) - min(gains) <= bound, gains


def test_long_answers_of_one_adapter_leave_another_its_half() -> None:
    """Taking turns by requests would give the long ones ten times as much."""
    long, short = make_adapter("long"), make_adapter("short")
    driver = Driver(
        make_info(max_rows=4, num_pages=PLENTY),
        SchedulerLimits(quantum_tokens=QUANTUM),
        adapters=[long, short],
    )
    flood(driver, long, 200, 4, 40)
    flood(driver, short, 1000, 4, 4)
    for _ in range(600):
        driver.turn()
    served = driver.computed(long), driver.computed(short)
    assert max(served) < 1.15 * min(served), served


def test_a_lone_request_under_a_flood_takes_at_most_twice_its_unloaded_steps() -> None:
    lone_request = make_request(list(range(10, 26)), 24)
    turns = []
    for size in (0, 500):
        flooded, quiet = make_adapter("flooded"), make_adapter("quiet")
        driver = Driver(
            make_info(max_rows=16, max_step_tokens=64, num_pages=PLENTY),
            adapters=[flooded, quiet],
        )
        flood(driver, flooded, size, 20, 30)
        for _ in range(size and 20):
            driver.turn()
        lone = driver.submit(lone_request, quiet)
        turns.append(turns_until_done(driver, lone))
        assert driver.tokens(lone) == driver.expected(lone)
    unloaded, loaded = turns
    assert loaded <= 2 * unloaded, turns


def test_a_lone_request_is_not_held_up_when_a_flood_has_taken_all_pages() -> None:
    flooded, quiet = make_adapter("flooded"), make_adapter("quiet")
    driver = Driver(
        make_info(max_rows=16, max_step_tokens=64, num_pages=32), adapters=[flooded, quiet]
    )
    flood(driver, flooded, 60, 12, 40)
    for _ in range(10):
        driver.turn()
    assert driver.scheduler.running.has_row, "pages are what is short"
    lone = driver.submit(make_request(list(range(10, 26)), 10), quiet)
    assert turns_until_done(driver, lone) <= 40
    assert lone.status is Status.DONE
    driver.finish(4000)


def test_an_adapter_without_a_row_takes_the_youngest_of_the_one_with_most() -> None:
    crowd, single, new = (make_adapter(name) for name in ("crowd", "single", "new"))
    driver = Driver(make_info(max_rows=4, num_pages=PLENTY), adapters=[crowd, single, new])
    crowded = [driver.submit(make_request([5, 6], 60), crowd) for _ in range(3)]
    kept = driver.submit(make_request([5, 6], 60), single)
    for _ in range(6):
        driver.turn()
    assert all(sequence.is_running for sequence in [*crowded, kept])
    late = driver.submit(make_request([7, 6], 2), new)
    while not driver.events[late]:
        driver.turn()
    assert driver.scheduler.num_preemptions == 1
    assert kept.status is Status.RUNNING
    assert [sequence.is_running for sequence in crowded] == [True, True, False]
    driver.finish()
    assert all(driver.tokens(s) == driver.expected(s) for s in [*crowded, kept, late])


def test_nobody_yields_the_only_row_of_an_adapter() -> None:
    adapters = [make_adapter(f"a{i}") for i in range(3)]
    driver = Driver(make_info(max_rows=2, num_pages=PLENTY), adapters=adapters)
    for adapter in adapters:
        driver.submit(make_request([5, 6], 30), adapter)
    driver.finish()
    assert driver.scheduler.num_preemptions == 0


def test_pages_are_taken_from_the_adapter_with_most_rows_and_never_from_the_oldest() -> None:
    crowd, lone = make_adapter("crowd"), make_adapter("lone")
    driver = Driver(
        make_info(num_pages=16, max_rows=4),
        SchedulerLimits(prefix_caching=False),
        adapters=[crowd, lone],
    )
    crowded = [driver.submit(make_request([5] * 7, 24), crowd) for _ in range(3)]
    late = driver.submit(make_request([6] * 7, 24), lone)
    set_back: set[Sequence] = set()
    while not driver.is_idle:
        driver.turn()
        set_back.update(s for s in driver.scheduler.waiting if s.started_at)
    assert set_back
    assert set_back <= set(crowded[1:]), "the oldest, or the only one of its adapter, had to yield"
    assert driver.tokens(late) == driver.expected(late)


def test_a_long_prompt_gives_way_after_a_quantum() -> None:
    long, short = make_adapter("long"), make_adapter("short")
    driver = Driver(
        make_info(max_step_tokens=16, num_pages=PLENTY),
        SchedulerLimits(quantum_tokens=QUANTUM),
        adapters=[long, short],
    )
    first = driver.submit(make_request([5] * 800, 1), long)
    for _ in range(6):
        driver.turn()
    assert first.is_prefilling
    second = driver.submit(make_request([6] * 40, 1), short)
    assert turns_until_done(driver, second) < 12
    assert first.is_prefilling
    driver.finish()


def test_prompts_of_running_sequences_share_the_budget_between_adapters() -> None:
    many, one = make_adapter("many"), make_adapter("one")
    driver = Driver(
        make_info(max_rows=8, max_step_tokens=16, num_pages=PLENTY),
        SchedulerLimits(prefill_chunk_tokens=4, quantum_tokens=8, prefix_caching=False),
        adapters=[many, one],
    )
    for _ in range(6):
        driver.submit(make_request([5] * 200, 1), many)
    for _ in range(4):
        driver.turn()
    late = driver.submit(make_request([6] * 60, 1), one)
    # Half of 16 tokens a step at 4 tokens a chunk: 15 chunks, two of which fit into a step.
    assert turns_until_done(driver, late) <= 22


def test_a_better_priority_starts_first_across_and_within_adapters() -> None:
    adapters = [make_adapter("a"), make_adapter("b")]
    driver = Driver(
        make_info(max_rows=1, num_pages=PLENTY),
        SchedulerLimits(ageing_seconds=1000.0),
        adapters=adapters,
    )
    running = driver.submit(make_request([5, 6], 12), adapters[0])
    for _ in range(4):
        driver.turn()
    assert running.is_running
    asked = [
        driver.submit(make_request([5 + i, 6], 2, priority=priority), adapters[i % 2])
        for i, priority in enumerate([3, 0, 2, -1, 1, -2])
    ]
    driver.finish()
    started = sorted(asked, key=lambda sequence: sequence.started_at)
    assert [sequence.request.priority for sequence in started] == [-2, -1, 0, 1, 2, 3]


def test_a_low_priority_under_a_flood_of_better_ones_gets_its_turn_with_age() -> None:
    ageing = 20.0
    adapters = [make_adapter("a"), make_adapter("b")]
    driver = Driver(
        make_info(max_rows=2, num_pages=PLENTY),
        SchedulerLimits(ageing_seconds=ageing),
        adapters=adapters,
    )
    low = [
        driver.submit(make_request([7, 6], 2, priority=3), adapter)
        for adapter in (adapters[1], adapters[0], adapters[0])
    ]
    while not all(sequence.started_at for sequence in low):
        while driver.scheduler.waiting.count(adapters[0]) < 6:
            driver.submit(make_request([5, 6], 6), adapters[0])
        driver.turn()
        assert driver.now < 400, "starvation"
    other, first, second = (sequence.started_at for sequence in low)
    assert min(other, first) >= 3 * ageing, "a priority counts until it has aged"
    assert max(other, first) < 3 * ageing + 40
    assert second >= first + 3 * ageing, "its line starts again from its own priority"


def test_a_row_is_not_taken_for_a_worse_priority() -> None:
    crowd, new = make_adapter("crowd"), make_adapter("new")
    driver = Driver(make_info(max_rows=2, num_pages=PLENTY), adapters=[crowd, new])
    for _ in range(2):
        driver.submit(make_request([5, 6], 20), crowd)
    driver.turn()
    driver.submit(make_request([7, 6], 2, priority=1), new)
    driver.finish()
    assert driver.scheduler.num_preemptions == 0


def test_an_adapter_runs_within_its_limit_and_others_use_the_rest() -> None:
    adapters = [make_adapter("a"), make_adapter("b")]
    driver = Driver(
        make_info(max_rows=8, num_pages=PLENTY), SchedulerLimits(max_running=2), adapters=adapters
    )
    flood(driver, adapters[0], 9, 3, 6)
    flood(driver, adapters[1], 9, 3, 6)
    flood(driver, None, 9, 3, 6)
    most = 0
    while not driver.is_idle:
        driver.turn()
        counts = [driver.scheduler.running.count(owner) for owner in [None, *adapters]]
        assert max(counts) <= 2
        most = max(most, sum(counts))
    assert most == 6


def test_what_was_taken_while_nobody_waited_is_no_debt() -> None:
    busy, other, new = (make_adapter(name) for name in ("busy", "other", "new"))
    driver = Driver(
        make_info(max_rows=1, num_pages=PLENTY),
        SchedulerLimits(quantum_tokens=8),
        adapters=[busy, other, new],
    )
    for adapter, length in ((busy, 60), (new, 2), (other, 40)):
        driver.submit(make_request([5, 6], length), adapter)
        for _ in range(length + 4 if adapter is not other else 5):
            driver.turn()
    assert driver.scheduler.running.count(other) == 1
    first = driver.submit(make_request([5, 6], 4), busy)
    second = driver.submit(make_request([5, 6], 4), new)
    driver.finish()
    assert first.started_at < second.started_at, "by arrival"


def test_a_preempted_sequence_waits_in_its_place_and_pays_once() -> None:
    queue = WaitingQueue()
    sequences = [Sequence(ticket, make_request([5, 6]), None, 0.0) for ticket in range(3)]
    for ticket in (1, 2, 0):
        queue.push(sequences[ticket])
    assert list(queue) == sequences
    assert queue.oldest(None) is sequences[0]
    driver = Driver(make_info(num_pages=6), SchedulerLimits(prefix_caching=False))
    for _ in range(2):
        driver.submit(make_request([5] * 7, 14))
    flood(driver, None, 1, 3, 1)
    charged = 0

    def charge(adapter: Adapter | None, num_tokens: int) -> None:
        nonlocal charged
        charged += num_tokens

    driver.scheduler._shares.charge = charge  # type: ignore[method-assign]
    driver.finish()
    assert driver.scheduler.num_preemptions
    computed = sum(len(sequence.tokens) - 1 for sequence in driver.events)
    assert charged == computed
