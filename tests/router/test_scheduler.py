"""Scheduler stories: what a plan says, step by step."""

from __future__ import annotations

from lorafleet.proto.messages import AdapterMove
from lorafleet.router.errors import GenerationFailed
from lorafleet.router.request import FinishReason
from lorafleet.router.scheduler import SchedulerLimits
from lorafleet.router.sequence import Status
from tests.fake_model import EOS_ID, FakeModel
from tests.router.helpers import UNIT, Driver, make_adapter, make_info, make_request


def test_a_prompt_is_computed_in_chunks_and_then_token_by_token() -> None:
    driver = Driver(make_info(max_step_tokens=5), run_ahead=0)
    sequence = driver.submit(make_request([*range(3, 15)], 3))
    driver.finish()
    shapes = [
        (plan.num_prefills, plan.first_positions[0], plan.token_counts[0], plan.samples[0])
        for plan in driver.plans
    ]
    assert shapes == [
        (1, 0, 5, False), (1, 5, 5, False), (1, 10, 2, True), (0, 12, 1, True), (0, 13, 1, True),
    ]  # fmt: skip
    assert driver.tokens(sequence) == driver.expected(sequence)
    assert [plan.new_page_counts for plan in driver.plans] == [[3], [0], [0], [1], [0]]


def test_the_chunk_size_caps_a_prompt_and_leaves_budget_to_others() -> None:
    driver = Driver(make_info(max_step_tokens=10), SchedulerLimits(prefill_chunk_tokens=4))
    driver.submit(make_request([5] * 9, 1))
    driver.submit(make_request([6] * 9, 1))
    driver.turn()
    assert driver.plans[0].token_counts == [4, 4]


def test_two_plans_are_sent_before_the_first_result_is_read() -> None:
    driver = Driver(make_info())
    driver.submit(make_request([5, 6], 3))
    driver.turn()
    assert [plan.first_positions for plan in driver.plans] == [[0], [2]]
    assert len(driver.tokens(next(iter(driver.events)))) == 1
    driver.finish()
    assert len(driver.plans) == 3  # and nothing is planned past the last token


def test_decodes_come_before_prefills_in_the_budget_and_after_them_in_the_plan() -> None:
    driver = Driver(make_info(max_step_tokens=6), run_ahead=0)
    driver.submit(make_request([5] * 3, 8))
    driver.turn()
    driver.submit(make_request([6] * 20, 1))
    driver.turn()
    plan = driver.plans[-1]
    assert (plan.num_prefills, plan.token_counts, plan.rows) == (1, [5, 1], [1, 0])


def test_a_token_that_ends_a_sequence_discards_the_one_behind_it() -> None:
    driver = Driver(make_info(), model=FakeModel(eos_after=2))
    sequence = driver.submit(make_request([5, 6], 9))
    other = driver.submit(make_request([5, 6, 7], 9))
    driver.finish()
    assert driver.tokens(sequence)[-1] == EOS_ID
    assert driver.events[sequence][-1].finish is FinishReason.EOS_TOKEN
    assert len(driver.tokens(other)) == 2


def test_ignore_eos_goes_on_to_the_length() -> None:
    driver = Driver(make_info(), model=FakeModel(eos_after=2))
    request = make_request([5, 6], 5)
    object.__setattr__(request, "ignore_eos", True)
    sequence = driver.submit(request)
    driver.finish()
    assert len(driver.tokens(sequence)) == 5
    assert driver.events[sequence][-1].finish is FinishReason.LENGTH


def test_the_youngest_is_preempted_and_continues_where_it_was() -> None:
    driver = Driver(make_info(num_pages=6), SchedulerLimits(prefix_caching=False))
    old = driver.submit(make_request([5] * 7, 14))
    young = driver.submit(make_request([6] * 7, 14))
    driver.finish()
    assert driver.scheduler.num_preemptions > 0
    starts = [start for plan in driver.plans for start in plan.starts]
    assert [start.token_ids[0] for start in starts].count(5) == 1
    again = starts[-1]
    assert again.num_prompt_tokens == 7
    assert again.token_ids[:7] == [6] * 7
    assert again.token_ids[7:] == driver.expected(young)[: len(again.token_ids) - 7]
    assert driver.tokens(old) == driver.expected(old)
    assert driver.tokens(young) == driver.expected(young)


def test_a_prefix_is_computed_once_per_adapter_and_salt() -> None:
    adapters = [make_adapter("a"), make_adapter("b")]
    driver = Driver(make_info(), adapters=adapters)
    prompt = [5] * 10
    expected_hits = 0
    for adapter in (None, adapters[0], adapters[1]):
        for salt in ("", "mine"):
            for hits in (0, 8):
                driver.submit(make_request(prompt, 2, salt=salt), adapter)
                driver.finish()
                expected_hits += hits
                assert driver.scheduler.kv.num_hit_tokens == expected_hits


def test_generated_tokens_are_cached_for_the_next_turn_of_a_conversation() -> None:
    driver = Driver(make_info())
    first = driver.submit(make_request([5, 6, 7], 6))
    driver.finish()
    driver.submit(make_request([5, 6, 7, *driver.tokens(first), 8], 2))
    driver.finish()
    assert driver.scheduler.kv.num_hit_tokens == 8


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    driver = Driver(make_info())
    driver.submit(make_request([5] * 9, 2))
    driver.finish()
    sequence = driver.submit(make_request([5] * 9, 2, prompt_logprobs=True))
    driver.finish()
    assert driver.scheduler.kv.num_hit_tokens == 0
    assert sequence.prompt_logprobs == [-0.75] * 8


def test_top_logprobs_reach_the_sequence_that_asked() -> None:
    driver = Driver(make_info())
    plain = driver.submit(make_request([5, 6], 3))
    asked = driver.submit(make_request([5, 6, 7], 3, num_top_logprobs=2))
    driver.finish()
    assert all(event.top == () for event in driver.events[plain])
    for event in driver.events[asked]:
        token, logprob = event.token_id, event.logprob
        assert event.top == ((token, logprob), (token + 1, logprob - 1))


def test_an_adapter_is_loaded_in_a_plan_without_rows_on_an_idle_engine() -> None:
    adapter = make_adapter("a", 2)
    driver = Driver(make_info(), adapters=[adapter])
    sequence = driver.submit(make_request([5, 6], 2), adapter)
    driver.turn()
    plan = driver.plans[0]
    assert plan.moves == [AdapterMove(adapter.key, 1, [0], [2 * UNIT], adapter.info.digest)]
    assert plan.rows == []
    driver.finish()
    assert driver.tokens(sequence) == driver.expected(sequence)


def test_others_run_while_an_adapter_loads() -> None:
    adapter = make_adapter("a")
    driver = Driver(make_info(), adapters=[adapter])
    driver.submit(make_request([5, 6], 8))
    driver.turn()
    cold = driver.submit(make_request([5, 6], 2), adapter)
    driver.submit(make_request([7, 6], 2))
    driver.turn()
    assert cold.status is Status.WAITING
    assert driver.plans[-1].moves
    assert len(driver.plans[-1].rows) == 2
    driver.finish()
    assert driver.tokens(cold) == driver.expected(cold)


def test_a_copy_nobody_waits_for_any_more_is_still_taken_in() -> None:
    adapter = make_adapter("a")
    driver = Driver(make_info(), adapters=[adapter])
    driver.submit(make_request([5, 6], 2))
    driver.turn()
    driver.scheduler.abort(driver.submit(make_request([5, 6], 2), adapter))
    cold = driver.submit(make_request([5, 6], 2), adapter)
    driver.turn()
    driver.scheduler.abort(cold)
    driver.finish()
    driver.turn()
    assert adapter.num_pins == 0
    assert driver.scheduler.device.num_loading == 0


def test_rows_are_grouped_by_slot_whatever_their_order_of_arrival() -> None:
    adapters = [make_adapter("a"), make_adapter("b")]
    driver = Driver(make_info(max_rows=8), adapters=adapters)
    for index in range(6):
        driver.submit(make_request([5 + index, 6], 9), [None, *adapters][index % 3])
    driver.finish()
    assert max(len(plan.rows) for plan in driver.plans) == 6
    assert any(plan.slots == [0, 0, 1, 1, 2, 2] for plan in driver.plans)


def test_overtaking_is_bounded() -> None:
    """A steady stream for one adapter cannot keep the only slot from another adapter."""
    busy, blocked = make_adapter("a"), make_adapter("b")
    driver = Driver(
        make_info(num_slots=1, max_rows=2),
        SchedulerLimits(max_overtakes=5),
        adapters=[busy, blocked],
    )
    for _ in range(2):  # staggered, so that the slot is never without a user
        driver.submit(make_request([5, 6], 6), busy)
        for _ in range(4):
            driver.turn()
    victim = driver.submit(make_request([7, 6], 2), blocked)
    num_turns = 0
    while not driver.events[victim]:
        while sum(s.status is Status.WAITING for s in driver.events) < 3:
            driver.submit(make_request([5, 6], 6), busy)
        driver.turn()
        num_turns += 1
        assert num_turns < 80
    assert victim.overtaken == 5
    driver.finish()


def test_an_older_adapter_gets_its_place_before_younger_ones_load() -> None:
    """Small adapters that keep loading cannot keep the arena fragmented for a big one."""
    small = [make_adapter(f"s{index}") for index in range(4)]
    big = make_adapter("big", 4)
    driver = Driver(
        make_info(num_slots=8, arena_bytes=4 * UNIT, max_rows=2),
        SchedulerLimits(max_overtakes=2),
        adapters=[*small, big],
    )
    driver.submit(make_request([5, 6], 4), small[0])
    driver.turn()
    victim = driver.submit(make_request([7, 6], 2), big)
    num_turns = 0
    while not driver.events[victim]:
        for adapter in small:
            driver.submit(make_request([5, 6], 4), adapter)
        driver.turn()
        num_turns += 1
        assert num_turns < 40
    driver.finish()


def test_a_sequence_whose_output_is_not_finite_fails_alone_and_taints_no_prefix() -> None:
    driver = Driver(make_info(), model=FakeModel(poison_id=9))
    bad = driver.submit(make_request([5] * 8 + [9], 4))
    good = driver.submit(make_request([5] * 8 + [6], 4))
    driver.finish()
    assert isinstance(driver.errors[bad], GenerationFailed)
    assert driver.tokens(good) == driver.expected(good)
    driver.scheduler.kv.prefix.check()


def test_aborting_frees_at_once_and_twice_is_harmless() -> None:
    driver = Driver(make_info(max_rows=1))
    running = driver.submit(make_request([5] * 9, 9))
    waiting = driver.submit(make_request([6] * 9, 9))
    driver.turn()
    for sequence in (running, waiting, running):
        driver.scheduler.abort(sequence)
    assert driver.scheduler.kv.pages.num_used == 0
    driver.finish()
    assert driver.tokens(waiting) == []
