"""The screen on a terminal and without one."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from lorafleet.deploy.screen import Screen


def screen(terminal: bool) -> tuple[Screen, StringIO]:
    out = StringIO()
    return Screen(Console(file=out, force_terminal=terminal, width=80, soft_wrap=True)), out


def test_plain_progress_is_a_line_a_quarter() -> None:
    shown, out = screen(terminal=False)
    for done in range(1001):
        shown.loading(done, 1000)
    shown.loaded()
    shares = [line.split()[2] for line in out.getvalue().splitlines()]
    assert shares == ["25%", "50%", "75%", "100%"]


def test_a_terminal_gets_a_bar_and_logs_above_it() -> None:
    shown, out = screen(terminal=True)
    shown.loading(1_000_000, 4_000_000)
    shown.log("shard 0", "[bold]as it is[/bold] :smile: " + "x" * 200)
    shown.loading(4_000_000, 4_000_000)
    shown.loaded()
    shown.loaded()
    assert "Loading weights" in out.getvalue()
    assert "4.0/4.0 MB" in out.getvalue()
    assert "[shard 0] [bold]as it is[/bold] :smile: " + "x" * 200 in out.getvalue()


def test_the_bars_first_frame_is_of_the_weights() -> None:
    shown, out = screen(terminal=True)
    shown.loading(1_000_000, 4_000_000)
    shown.loaded()
    assert "1.0/4.0 MB" in out.getvalue()
    assert "0/100 bytes" not in out.getvalue()
