"""Frozen dataclass -> argparse -> instance: a flag, its variable, default and help in one place.

A config field made with `flag(default, help)` becomes `--field-name` with environment variable
`FIELD_NAME`, or the one it names; a flag given wins over the environment, which wins over the
default. An empty variable counts as not set.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
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


_BOOLS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}


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
    variable: str = "",
    secret: bool = False,
) -> Any:
    """A config field that is also a command-line flag; without a default it is required.

    `variable` is for a flag whose own name others use: HOSTNAME is in every shell's environment. A
    secret stays out of `repr`, of help and of the command lines we make: see `secrets_of`.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "short": short,
        "variable": variable,
        "secret": secret,
    }
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
    values |= overrides
    try:
        return config(**values)
    except ValueError as error:
        raise ValueError(f"{error}{_source(config, str(error), values)}") from error


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
        _variable(f): str(getattr(config, f.name))
        for config in configs
        for f in fields(config)
        if f.metadata.get("secret")
    }


def _add_flag(group: Any, f: Field[Any], hint: Any) -> None:
    default, environ = f.default, os.environ.get(_variable(f), "")
    required = default is MISSING and not environ
    options: dict[str, Any] = {"dest": f.name, "required": required}
    if environ:
        default = _FromEnvironment(environ)
        default.variable = _variable(f)
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
        options |= {"nargs": "*", "action": _Collect}
        default = tuple(environ.split()) if environ else default
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["choices"] = f.metadata["choices"] or None
    names = [_flag_name(f)] + ([f.metadata["short"]] if f.metadata["short"] else [])
    shown = "required" if required else f"default: {_shown(default)}"
    if f.metadata.get("secret") and default:
        shown = "default: set"
    help = f"{f.metadata['help']} ({shown}; env {_variable(f)})".replace("%", "%%")
    action = group.add_argument(
        *names, help=help, default=None if default is MISSING else default, **options
    )
    action.type = _reader(hint, f.metadata["choices"])  # of a bool's variable, too


class _FromEnvironment(str):
    """A default that is still to be read, and where it came from."""

    variable = ""


def _source(config: Any, error: str, values: dict[str, Any]) -> str:
    """Names the variable that has the value of the flag an error is about; empty if none does."""
    for f in fields(config):
        if error.startswith(f"{_flag_name(f)} ") and f.name in values:
            is_variables = os.environ.get(_variable(f)) == str(values[f.name])
            return f" (environment variable {_variable(f)})" if is_variables else ""
    return ""


def _reader(kind: Any, choices: tuple[str, ...]) -> Callable[[str], Any]:
    """Reads a flag's value, or its variable's, which argparse compares with no choices."""

    def read(text: str) -> Any:
        variable = text.variable if isinstance(text, _FromEnvironment) else ""
        source = f" (environment variable {variable})" if variable else ""
        try:
            value = _as_bool(text) if kind is bool else kind(text)
        except ValueError as error:
            told = f"{text!r} is not {_KINDS[kind]}" if kind in _KINDS else str(error)
            raise argparse.ArgumentTypeError(told + source) from error
        if choices and value not in choices:
            told = f"{text!r} is none of {', '.join(map(repr, choices))}"
            raise argparse.ArgumentTypeError(told + source)
        return value

    return read


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


def _variable(f: Field[Any]) -> str:
    return f.metadata["variable"] or f.name.upper()


def _as_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in _BOOLS:
        raise ValueError(f"{text!r} is none of {', '.join(_BOOLS)}")
    return _BOOLS[word]


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
