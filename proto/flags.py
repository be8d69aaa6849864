"""Frozen dataclass -> argparse -> instance: a flag, its variable, default and help in one place.

A config field made with `flag(default, help)` becomes `--field-name` with environment variable
`FIELD_NAME`; a flag given wins over the environment, which wins over the default.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_SIZES = {
    "": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


class Bytes(int):
    """A byte count; on the command line a number with an optional unit (512MiB, 20GB)."""

    def __new__(cls, value: int | str) -> Bytes:
        if isinstance(value, int):
            return super().__new__(cls, value)
        text = value.strip()
        for unit in sorted(_SIZES, key=len, reverse=True):
            number = text.removesuffix(unit).strip()
            if text.endswith(unit) and number.replace(".", "", 1).isdigit():
                return super().__new__(cls, int(float(number) * _SIZES[unit]))
        raise ValueError(f"{value!r} is not a byte count such as 512MiB or 20GB")

    def __str__(self) -> str:
        for unit in ("GiB", "MiB", "KiB"):
            if int(self) and int(self) % _SIZES[unit] == 0:
                return f"{int(self) // _SIZES[unit]}{unit}"
        return str(int(self))


def flag(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Iterable[str] = (),
    short: str = "",
    secret: bool = False,
) -> Any:
    """A config field that is also a command-line flag; without a default it is required.

    A secret stays out of `repr`, of help and of the command lines we make: see `secrets_of`.
    """
    metadata = {"help": help, "choices": tuple(choices), "short": short, "secret": secret}
    if default is MISSING:
        return field(metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


def add_flags(parser: argparse.ArgumentParser, *configs: type, skip: Iterable[str] = ()) -> None:
    """Adds one flag per field of the configs; a field several configs share is added once."""
    seen = set(skip)
    for config in configs:
        group = parser.add_argument_group(_title(config))
        hints = get_type_hints(config)
        for f in fields(config):
            if f.name not in seen:
                seen.add(f.name)
                _add_flag(group, f, hints[f.name])


def from_flags(config: type[T], args: argparse.Namespace, **overrides: Any) -> T:
    """The config an argparse result describes; `overrides` win over flags.

    Raises ValueError, naming flag and range, from the config's own checks.
    """
    values = {}
    for f in fields(config):  # type: ignore[arg-type]
        if hasattr(args, f.name):
            value = getattr(args, f.name)
            values[f.name] = tuple(value) if isinstance(value, list) else value
    return config(**(values | overrides))


def to_flags(config: Any) -> list[str]:
    """The command line that, with `secrets_of`, `from_flags` turns back into `config`."""
    line: list[str] = []
    for f in fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("secret"):
            continue  # anyone on the machine can read a command line
        if isinstance(value, bool):
            line.append(_flag_name(f) if value else _flag_name(f, "no-"))
        elif isinstance(value, tuple):
            line += [_flag_name(f), *map(str, value)] if value else []
        else:
            line.append(f"{_flag_name(f)}={value}")
    return line


def secrets_of(*configs: Any) -> dict[str, str]:
    """The environment variables that carry the configs' secrets, which `to_flags` leaves out."""
    return {
        f.name.upper(): str(getattr(config, f.name))
        for config in configs
        for f in fields(config)
        if f.metadata.get("secret")
    }


def _add_flag(group: Any, f: Field[Any], hint: Any) -> None:
    default, environ = f.default, os.environ.get(f.name.upper())
    required = default is MISSING and environ is None
    convert: Any = _as_bool if hint is bool else hint
    options: dict[str, Any] = {"dest": f.name, "required": required}
    if get_origin(hint) is tuple:
        convert = get_args(hint)[0]
        options |= {"nargs": "*", "action": _Collect}
        default = tuple(environ.split()) if environ is not None else default
    elif environ is not None:
        default = environ
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
        default = _as_bool(default)
    else:
        options["type"] = convert
        options["choices"] = f.metadata["choices"] or None
    names = [_flag_name(f)] + ([f.metadata["short"]] if f.metadata["short"] else [])
    shown = "required" if required else f"default: {_shown(default)}"
    if f.metadata.get("secret") and default:
        shown = "default: set"
    help = f"{f.metadata['help']} ({shown}; env {f.name.upper()})".replace("%", "%%")
    group.add_argument(
        *names, help=help, default=None if default is MISSING else default, **options
    )


class _Collect(argparse.Action):
    """A list's values, whether its flag is given once with all of them or once for each."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        so_far = getattr(namespace, self.dest, None)
        given = so_far if isinstance(so_far, list) else []  # the default is a tuple
        setattr(namespace, self.dest, [*given, *values])


def _flag_name(f: Field[Any], prefix: str = "") -> str:
    return f"--{prefix}{f.name.replace('_', '-')}"


def _as_bool(value: Any) -> bool:
    return (
        value
        if isinstance(value, bool)
        else str(value).strip().lower() in ("1", "true", "yes", "on")
    )


def _shown(default: Any) -> str:
    if isinstance(default, (tuple, list)):
        return " ".join(map(str, default)) or "none"
    return str(default) if str(default) else "none"


def _title(config: type) -> str:
    return (config.__doc__ or config.__name__).splitlines()[0].rstrip(".")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError naming the flag and the allowed range."""
    if not low <= value <= high:
        raise ValueError(
            f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}"
        )
