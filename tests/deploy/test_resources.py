"""What each rank gets of the machine."""

from __future__ import annotations

import pytest

from lorafleet.deploy import resources
from lorafleet.deploy.resources import rank_environments

OTHERS = {"MALLOC_ARENA_MAX": "2", "GOMP_SPINCOUNT": "10000"}


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "usable_cores", lambda: list(range(8)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *OTHERS):
        monkeypatch.delenv(name, raising=False)


def devices(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(resources, "cuda_devices", lambda: list(names))


@pytest.mark.parametrize(("num_shard", "share"), [(1, "8"), (2, "4"), (3, "2"), (16, "1")])
def test_cores_are_shared_out(cores: None, num_shard: int, share: str) -> None:
    environments = rank_environments(num_shard, "cpu")
    threads = {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}
    assert environments == [threads | OTHERS] * num_shard


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", *OTHERS])
def test_what_the_operator_set_wins(
    cores: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "5")
    assert rank_environments(2, "cpu")[1][name] == "5"


def test_each_rank_sees_one_cuda_device(cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, "3", "GPU-5a", "6")
    environments = rank_environments(2, "auto")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["3", "GPU-5a"]


def test_too_few_cuda_devices_are_refused(cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, "0")
    with pytest.raises(ValueError, match=r"--num-shard 2 needs as many CUDA devices .* offers 1"):
        rank_environments(2, "auto")
    assert "CUDA_VISIBLE_DEVICES" not in rank_environments(2, "cpu")[0]


def test_no_cuda_device_is_fine_unless_asked_for(
    cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices(monkeypatch)
    assert "CUDA_VISIBLE_DEVICES" not in rank_environments(1, "auto")[0]
    with pytest.raises(ValueError, match="offers 0"):
        rank_environments(1, "cuda")
