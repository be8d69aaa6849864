"""A child learns of its launcher's end, and only a launched one cares."""

from __future__ import annotations

import os
import subprocess
import sys

from lorafleet.proto.lifeline import PARENT_PIPE

PROGRAM = """
import os, sys, threading
from lorafleet.proto.lifeline import watch_parent
watch_parent(lambda: os._exit(5))
print("up", flush=True)
threading.Event().wait({patience})
"""


def start(patience: str, parent_pipe: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(patience=patience)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {PARENT_PIPE: parent_pipe},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_it_is_told_when_the_pipe_closes() -> None:
    with start(patience="", parent_pipe="1") as process:
        assert process.stdin is not None
        process.stdin.write("words mean nothing")
        process.stdin.close()
        assert process.wait(60) == 5


def test_it_may_end_by_itself_first() -> None:
    with start(patience="0", parent_pipe="1") as process:
        assert process.wait(60) == 0


def test_started_by_hand_it_ignores_its_standard_input() -> None:
    with start(patience="0.2", parent_pipe="") as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
