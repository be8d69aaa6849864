"""Builds the demo's files once: a stamp of the recipe says whether they are still right."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import IO

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lorafleet.deploy.demo.recipe import ADAPTERS, BASE, RENDEZVOUS, SEED, TEAM_SIZE

DEFAULT_DIR = Path(".demo")
STAMP = "stamp"
_SOURCES = [
    Path(__file__).with_name(f"{module}.py")
    for module in ("corpus", "optimize", "recipe", "styles", "tokenizer", "topics", "train")
]
_LIBRARIES = ("peft", "safetensors", "tokenizers", "torch", "transformers")

Train = Callable[[Path, int, Console], None]  # (empty folder, seed, where progress goes)


class BuildFailed(Exception):
    """Training ended without the files; the message holds its last words."""


def stamp(seed: int = SEED) -> str:
    """A digest of everything that decides the files: sources, seed, library versions."""
    digest = hashlib.sha256(f"seed {seed}".encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library} {version(library)}".encode())
    return digest.hexdigest()


def is_built(folder: Path, seed: int = SEED) -> bool:
    """Whether `folder` holds the files of this recipe."""
    file = folder / STAMP
    return file.is_file() and file.read_text() == stamp(seed)


def train_here(folder: Path, seed: int, console: Console) -> None:
    """Trains into `folder` behind a progress bar. Raises BuildFailed.

    In a process of its own, so that torch and its threads are gone afterwards.
    """
    total = BASE.steps + sum(recipe.schedule.steps for recipe in ADAPTERS)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Building the demo model", total=total)
        for event in _events(folder, seed):
            bar.update(task, advance=1, description=f"Training the {event['what']}")


def build(folder: Path, console: Console, seed: int = SEED, train: Train = train_here) -> bool:
    """Makes sure `folder` holds the demo's files; returns whether they had to be trained.

    The folder appears complete or not at all. Raises BuildFailed.
    """
    if is_built(folder, seed):
        return False
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if is_built(folder, seed):  # another process was first
            return False
        _check_is_ours(folder)
        with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            train(new, seed, console)
            (new / STAMP).write_text(stamp(seed))
            if folder.exists():
                folder.rename(Path(scratch, "old"))
            new.rename(folder)
    return True


def _check_is_ours(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / STAMP).is_file():
        raise BuildFailed(f"{folder} holds something else than a demo: choose another --dir")


def _events(folder: Path, seed: int) -> Iterator[dict[str, str]]:
    """The progress lines of the whole team, as they come; ends with its last process."""
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile("w+") as log, os.fdopen(read_end) as lines, ExitStack() as stack:
        team = [_start(folder, seed, rank, write_end, log, stack) for rank in range(TEAM_SIZE)]
        os.close(write_end)
        yield from map(json.loads, lines)
        if any(process.wait() for process in team):
            log.seek(0)
            raise BuildFailed(f"training the demo model failed:\n{log.read()[-4000:]}")
    (folder / RENDEZVOUS).unlink(missing_ok=True)


def _start(
    folder: Path, seed: int, rank: int, stdout: int, log: IO[str], stack: ExitStack
) -> subprocess.Popen[bytes]:
    """One member of the team; it does not outlive the stack."""
    command = [sys.executable, "-P", "-m", "lorafleet.deploy.demo.train"]
    process = subprocess.Popen(
        [*command, str(folder), str(seed), str(rank)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=log,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process
