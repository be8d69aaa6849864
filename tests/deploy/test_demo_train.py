"""Training: deterministic, and ordinary folders come out of it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafleet.deploy.demo.recipe import ADAPTERS, Schedule
from lorafleet.deploy.demo.train import train_all

SHORT = Schedule(steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=1)


def train(folder: Path, seed: int) -> list[tuple[str, int, int]]:
    reports: list[tuple[str, int, int]] = []
    adapters = [replace(recipe, schedule=SHORT) for recipe in ADAPTERS]
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
            train_all(folder, seed, lambda *report: reports.append(report), SHORT, adapters)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return reports


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    reports = train(folder, seed=0)
    assert reports[:3] == [("base model", step, 3) for step in (1, 2, 3)]
    assert len(reports) == 3 * (1 + len(ADAPTERS))
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    files = folder.rglob("*.safetensors")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_seed_decides_every_weight(trained: Path, tmp_path: Path) -> None:
    train(tmp_path / "same", seed=0)
    assert weights(tmp_path / "same") == weights(trained)


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
