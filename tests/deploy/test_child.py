"""Child: lines, events and endings of real processes."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

from lorafleet.deploy.child import MAX_LINE_BYTES, Child, how_it_ended


class Heard:
    """What a child told its launcher."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.logs: list[tuple[str, str]] = []

    async def run(self, program: str, **environment: str) -> int:
        """Runs a Python program as a child to its end; returns its code."""
        child = await Child.start(
            "child",
            [sys.executable, "-c", program],
            environment,
            lambda _, event: self.events.append(event),
            lambda name, line: self.logs.append((name, line)),
        )
        code = await child.exited
        child.close()
        return code


@pytest.fixture
def heard() -> Heard:
    return Heard()


async def test_json_objects_on_standard_output_are_events(heard: Heard) -> None:
    program = """for line in '{"event": "loading"}', '{"other": 1}', '{oops': print(line)"""
    assert await heard.run(program) == 0
    assert heard.events == [{"event": "loading"}]
    assert heard.logs == [("child", '{"other": 1}'), ("child", "{oops")]


async def test_standard_error_is_never_an_event(heard: Heard) -> None:
    await heard.run("""import sys; print('{"event": "ready"}', file=sys.stderr)""")
    assert heard.events == []
    assert heard.logs == [("child", '{"event": "ready"}')]


async def test_a_line_in_pieces_is_one_line(heard: Heard) -> None:
    program = (
        "import os; from threading import Event\n"
        """for piece in ('{"event": "re', 'ady"', '}', '\\n'):\n"""
        "    os.write(1, piece.encode()); Event().wait(0.01)"
    )
    await heard.run(program)
    assert heard.events == [{"event": "ready"}]


async def test_a_last_line_without_an_end_and_carriage_returns_are_heard(heard: Heard) -> None:
    await heard.run(r"import os; os.write(2, b'10%\r20%\r\nno end \xff')")
    assert [line for _, line in heard.logs] == ["10%", "20%", "no end �"]


async def test_an_endless_line_does_not_grow_without_bound(heard: Heard) -> None:
    await heard.run(f"import os; os.write(2, b'x' * {4 * MAX_LINE_BYTES})")
    assert sum(len(line) for _, line in heard.logs) == 4 * MAX_LINE_BYTES
    assert max(len(line) for _, line in heard.logs) <= 3 * MAX_LINE_BYTES


async def test_the_environment_is_added_to_our_own(heard: Heard) -> None:
    program = "import os; print(os.environ['PATH'] != '', os.environ['OMP_NUM_THREADS'])"
    await heard.run(program, OMP_NUM_THREADS="3")
    assert heard.logs == [("child", "True 3")]


async def test_it_ends_when_asked_and_asking_again_is_harmless() -> None:
    program = 'print(\'{"event": "ready"}\'); import signal; signal.pause()'
    child: Child = await Child.start(
        "child",
        [sys.executable, "-c", program],
        {},
        lambda child, _: child.terminate(),
        lambda name, line: None,
    )
    assert await child.exited == -signal.SIGTERM
    child.terminate()
    child.kill()
    child.close()


def test_how_it_ended() -> None:
    assert how_it_ended(3) == "exited with code 3"
    assert how_it_ended(-9) == "was killed by SIGKILL"
