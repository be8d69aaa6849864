"""The demo's cache: built once, whole or not at all."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from lorafleet.deploy.demo.build import BuildFailed, build, is_built, stamp

QUIET = Console(file=io.StringIO())


class Trainer:
    """Writes one file and counts its runs."""

    def __init__(self, fails: bool = False) -> None:
        self.runs = 0
        self.fails = fails

    def __call__(self, folder: Path, seed: int, console: Console) -> None:
        self.runs += 1
        (folder / "weights").write_text(f"run {self.runs} of seed {seed}")
        if self.fails:
            raise BuildFailed("out of chalk")


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_the_second_build_does_nothing(tmp_path: Path) -> None:
    train, folder = Trainer(), tmp_path / "demo"
    assert build(folder, QUIET, train=train)
    assert not build(folder, QUIET, train=train)
    assert train.runs == 1
    assert files(tmp_path) == {"demo", "demo.lock"}


def test_another_recipe_builds_anew(tmp_path: Path) -> None:
    train, folder = Trainer(), tmp_path / "demo"
    build(folder, QUIET, seed=1, train=train)
    assert stamp(1) != stamp(2)
    assert not is_built(folder, seed=2)
    assert build(folder, QUIET, seed=2, train=train)
    assert (folder / "weights").read_text() == "run 2 of seed 2"
    assert files(tmp_path) == {"demo", "demo.lock"}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with pytest.raises(BuildFailed, match="chalk"):
        build(folder, QUIET, train=Trainer(fails=True))
    assert not folder.exists()
    build(folder, QUIET, seed=1, train=Trainer())
    with pytest.raises(BuildFailed, match="chalk"):
        build(folder, QUIET, seed=2, train=Trainer(fails=True))
    assert is_built(folder, seed=1)
    assert files(tmp_path) == {"demo", "demo.lock"}


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    folder, train = tmp_path / "photos", Trainer()
    folder.mkdir()
    (folder / "cat.jpg").touch()
    with pytest.raises(BuildFailed, match="choose another --dir"):
        build(folder, QUIET, train=train)
    assert train.runs == 0
    assert files(folder) == {"cat.jpg"}


def test_builders_side_by_side_train_once(tmp_path: Path) -> None:
    train = Trainer()
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build(tmp_path / "demo", QUIET, train=train), range(4)))
    assert (sum(built), train.runs) == (1, 1)
