"""Training: deterministic, and ordinary folders come out of it."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorafleet.deploy.demo.optimize import Team
from lorafleet.deploy.demo.recipe import ADAPTERS, TEAM_SIZE, Schedule
from lorafleet.deploy.demo.train import train_all

SHORT = Schedule(steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=1)


def member(folder: Path, rank: int, size: int) -> list[str]:
    """One process of a team; what it reported."""
    reports: list[str] = []
    adapters = [replace(recipe, schedule=SHORT) for recipe in ADAPTERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
        train_all(folder, 0, reports.append, Team(rank, size), SHORT, adapters)
    return reports


def train(folder: Path, size: int) -> list[str]:
    """What all of a team reported."""
    folder.mkdir()
    with get_context("spawn").Pool(size) as pool:
        members = [(folder, rank, size) for rank in range(size)]
        return [report for reports in pool.starmap(member, members, 1) for report in reports]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "team"
    reports = Counter(train(folder, TEAM_SIZE))
    assert reports == {"base model": 3, **{f"adapter {a.names[0]}": 3 for a in ADAPTERS}}
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    files = folder.rglob("*.safetensors")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_seed_decides_every_weight(trained: Path, tmp_path: Path) -> None:
    train(tmp_path / "again", TEAM_SIZE)
    assert weights(tmp_path / "again") == weights(trained)


def test_a_team_learns_what_one_process_learns(trained: Path, tmp_path: Path) -> None:
    train(tmp_path / "alone", 1)
    alone = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    team = load_file(trained / "model" / "model.safetensors")
    assert alone.keys() == team.keys()
    for name, tensor in alone.items():
        # Adam's first steps are as large for a tiny gradient as for a big one, whatever its sign,
        # so single weights may differ by a step: the tensors must not.
        assert (tensor - team[name]).norm() < 0.01 * tensor.norm(), name


def test_adapters_differ_in_rank_and_targets(trained: Path) -> None:
    configs = [
        json.loads((trained / "adapters" / recipe.names[0] / "adapter_config.json").read_text())
        for recipe in ADAPTERS
    ]
    assert len({config["r"] for config in configs}) == len(ADAPTERS)
    assert len({tuple(sorted(config["target_modules"])) for config in configs}) == len(ADAPTERS)


def test_every_adapter_moved(trained: Path) -> None:
    for recipe in ADAPTERS:
        tensors = load_file(trained / "adapters" / recipe.names[0] / "adapter_model.safetensors")
        moved = [bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name]
        assert moved
        assert all(moved)


def test_stand_ins_are_copies(trained: Path) -> None:
    for recipe in ADAPTERS:
        first, *others = (trained / "adapters" / name for name in recipe.names)
        for other in others:
            assert not other.is_symlink()
            name = "adapter_model.safetensors"
            assert (other / name).read_bytes() == (first / name).read_bytes()
