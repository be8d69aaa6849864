"""The `lorafleet` command. Its help is the reference of every flag."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from lorafleet.deploy.output import leave

# A command's module has add_flags(parser) and run(args) -> exit code.
COMMANDS = {
    "serve": ("serve a base model and its adapters on this machine", "lorafleet.deploy.serve"),
    "adapters": (
        "manage the adapters of a running server; check folders without one",
        "lorafleet.deploy.adapters.cli",
    ),
    "bench": ("load a running server and measure it", "lorafleet.deploy.bench.cli"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Leaves with 141 when nobody reads its output."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            print(end="", flush=True)  # while a broken pipe can be caught
    except BrokenPipeError:
        leave()


def _run(argv: list[str]) -> int:
    parser = _parser()
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, module) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:  # the other commands' modules stay unloaded
            import_module(module).add_flags(command)
    args = parser.parse_args(argv)
    code: int = import_module(COMMANDS[args.command][1]).run(args)
    return code


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lorafleet",
        description="Serve thousands of LoRA fine-tunes of one base model.",
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=_FullHelp, nargs=0, help="show every command's flags"
    )
    parser.add_argument("--version", action="version", version=f"lorafleet {version('lorafleet')}")
    return parser


class _FullHelp(Action):
    """Prints the overview, then each command's own help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, default=SUPPRESS)

    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        print(parser.format_help())
        for name, (summary, module) in COMMANDS.items():
            command = ArgumentParser(prog=f"lorafleet {name}", description=summary)
            import_module(module).add_flags(command)
            for shown in _with_subcommands(command):
                print(shown.format_help())
        parser.exit()


def _with_subcommands(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            yield from action.choices.values()
