"""`python -m lorafleet.deploy.demo`: build what is missing, serve it, show it."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console

from lorafleet.deploy.demo.build import DEFAULT_DIR, BuildFailed, build
from lorafleet.deploy.demo.run import measure, show
from lorafleet.deploy.demo.service import NUM_SHARDS, ServiceFailed, demo_flags, running_service

PIPE_COLUMNS = 120  # when nobody says how wide the output is


def main() -> int:
    """Returns 0 only when everything worked, 130 after Ctrl-C."""
    parser = ArgumentParser(prog="python -m lorafleet.deploy.demo", description=__doc__)
    add = parser.add_argument
    add("--dir", type=Path, default=DEFAULT_DIR, help="the demo model's folder (default: .demo)")
    add("--build-only", action="store_true", help="build the model and adapters, serve nothing")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    try:
        _build(args.dir, console)
        return 0 if args.build_only else _demonstrate(args.dir, console)
    except (BuildFailed, ServiceFailed) as error:
        console.print(str(error), style="red", markup=False)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return 128 + signal.SIGINT
    return 1


def _build(folder: Path, console: Console) -> None:
    start = time.monotonic()
    if build(folder, console):
        console.print(f"Built the demo model in {folder} in {time.monotonic() - start:.0f} s.")
    else:
        console.print(f"The demo model in {folder} is up to date.")


def _demonstrate(folder: Path, console: Console) -> int:
    status = console.status(f"Starting a router and {NUM_SHARDS} tensor-parallel shards")
    status.start()
    try:
        with running_service(demo_flags(folder)) as url:
            status.update("Asking the base model and every adapter at once")
            results = asyncio.run(measure(url))
            status.update("Stopping the service")
    finally:
        status.stop()
    show(console, results)
    for problem in results.problems():
        console.print(problem, style="red", markup=False)
    return 1 if results.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
