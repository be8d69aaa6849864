"""The worker's part in moves that the router has taken back meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from lorafleet.cache.errors import AdapterNotFound
from lorafleet.proto.messages import AdapterKey, AdapterMove, StepPlan
from lorafleet.shard.streams import StepStream
from lorafleet.shard.worker import Worker

MOVE = AdapterMove(AdapterKey("local", "x"), 1, [0], [256], "digest")
MOVE_ALONE = StepPlan(1, moves=[MOVE])


def worker(*, answers: bool) -> Worker:
    """Of a rank whose host memory has nothing."""
    decoder = SimpleNamespace(device=torch.device("cpu"))
    store = Mock(host=Mock(side_effect=AdapterNotFound("not in host memory")))
    adapters = Mock(take_ready=list)
    return Worker(decoder, Mock(), Mock(), adapters, store, answers)  # type: ignore[arg-type]


def test_a_rank_that_is_behind_passes_over_what_was_evicted_again() -> None:
    late = worker(answers=False)
    assert late.finish(late.launch(StepStream(), MOVE_ALONE)).ready_slots == []


def test_the_rank_that_answers_has_what_is_moved() -> None:
    with pytest.raises(AdapterNotFound):
        worker(answers=True).launch(StepStream(), MOVE_ALONE)


def test_no_row_computes_with_a_slot_that_was_passed_over() -> None:
    plan = StepPlan(1, moves=[MOVE], rows=[0], token_counts=[1], slots=[1])
    with pytest.raises(AdapterNotFound):
        worker(answers=False).launch(StepStream(), plan)
