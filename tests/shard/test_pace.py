"""Pace on clocks of its own; the service and the store around it are the real ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import pytest
import torch

from lorafleet.cache.store import AdapterStore
from lorafleet.proto.codec import encode
from lorafleet.proto.messages import AdapterKey, FetchAdapterRequest, StepPlan, Tier
from lorafleet.shard.pace import FREE_SECONDS, SHARE, STEP_SECONDS, Pace
from lorafleet.shard.service import ShardService
from lorafleet.shard.streams import StepStream
from tests.cache.adapter_cases import Settings, tiny_layout, write_adapter
from tests.fakes import FakeConfig

USED = 0.1  # seconds of CPU, of which the share allows one in 2 s


@dataclass
class Machine:
    """Time passes when somebody sleeps; threads have computed `cpu` seconds."""

    now: float = 0.0
    cpu: float = FREE_SECONDS
    steps_until: float = 0.0
    other: Thread | None = None  # a fetch that goes on while the first one sleeps
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self.pace = Pace(lambda: self.now, lambda: self.cpu, self.sleep)

    def sleep(self, seconds: float) -> None:
        other, self.other = self.other, None
        if other is not None:
            other.start()
            other.join()
        self.now += seconds
        if self.now < self.steps_until:
            self.pace.step()


def stepping(until: float = 100.0) -> Machine:
    machine = Machine(steps_until=until)
    machine.pace.step()
    return machine


def test_a_fetch_keeps_to_its_share_while_steps_run() -> None:
    machine = stepping()
    for piece in range(1, 4):
        machine.cpu += USED
        machine.pace.rest()
        assert machine.now == pytest.approx(piece * USED / SHARE)


def test_what_a_small_fetch_takes_is_free() -> None:
    machine = stepping()
    machine.pace.rest()
    assert machine.now == 0.0


def test_time_that_a_fetch_waited_is_not_saved_up() -> None:
    machine = stepping(until=1e9)
    machine.now = 50.0  # for its source
    machine.pace.step()
    machine.cpu += USED
    machine.pace.rest()
    assert machine.now == pytest.approx(50.0 + USED / SHARE)


def test_nobody_rests_without_steps() -> None:
    machine = Machine()
    machine.cpu += USED
    machine.pace.rest()
    assert machine.now == 0.0


def test_a_rest_ends_soon_after_the_last_step() -> None:
    machine = stepping(until=0.5)
    machine.cpu += 10 * USED
    machine.pace.rest()
    assert machine.now == pytest.approx(0.5 + STEP_SECONDS, abs=0.1)  # not 20 s


def test_fetches_have_one_share_between_them() -> None:
    machine = stepping()
    machine.cpu += USED
    machine.other = Thread(target=machine.pace.rest)
    machine.pace.rest()
    assert machine.now >= 2 * USED / SHARE - 0.01


@pytest.mark.parametrize(("device", "rests"), [("cpu", True), ("cuda", False)])
def test_fetches_rest_between_steps_that_take_the_same_cores(
    tmp_path: Path, device: str, rests: bool
) -> None:
    write_adapter(tmp_path / "a")
    settings = Settings(str(tmp_path), str(tmp_path / "cache"))
    store = AdapterStore(settings, tiny_layout(), torch.float32, torch.device("cpu"))
    machine = Machine(cpu=FREE_SECONDS + USED)
    service = ShardService(machine.pace)
    service.open(replace(FakeConfig().info(), device=device), store)
    service._read_plans(iter([encode(StepPlan(0, rows=[0]))]), StepStream())
    request = FetchAdapterRequest(AdapterKey("local", "a"), Tier.HOST)
    assert list(service.FetchAdapter(encode(request), Mock()))[-1].info.digest
    assert (machine.now > 0.0) == rests
