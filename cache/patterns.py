"""Regular expressions of peft's configs: they come from outside and are matched safely.

A pattern comes from whoever published the adapter, and Python's matcher holds the interpreter's
lock while it backtracks; patterns that could backtrack for long are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorafleet.cache.errors import AdapterUnservable, shown

_MAX_LENGTH = 256
_MAX_REPEATS = 3
_MAX_GROUPS = 4
_MAX_REPEATING_PATTERNS = 32

_REPEAT = re.compile(r"(?<!\()[*+?{]")  # not the ? of (?: and its like
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


class ModulePatterns:
    """Values by module name: the first key that matches the end of the name decides."""

    def __init__(self, field: str, values: Mapping[str, Any]) -> None:
        """Raises AdapterUnservable for a key that is no usable regular expression."""
        self._values = [(_compiled(field, key), value) for key, value in values.items()]
        if sum(_repeats(key) > 0 for key in values) > _MAX_REPEATING_PATTERNS:
            raise AdapterUnservable(
                f"{field} has more than {_MAX_REPEATING_PATTERNS} keys with repetitions."
            )

    def get(self, module: str, default: Any) -> Any:
        """The value for a module, by peft's rule: whole name, or a suffix of it after a dot."""
        for pattern, value in self._values:
            if pattern.match(module):
                return value
        return default


def name_pattern(field: str, pattern: str) -> re.Pattern[str] | None:
    """A regular expression for whole module names; None for one that is too complex.

    Raises AdapterUnservable for one that is none.
    """
    if not _is_simple(pattern):
        return None
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise AdapterUnservable(
            f"{field} is {shown(pattern)}, which is not a regular expression."
        ) from None


def _is_simple(key: str) -> bool:
    """Whether matching cannot backtrack for long."""
    return not (
        len(key) > _MAX_LENGTH
        or _repeats(key) > _MAX_REPEATS
        or key.count("(") > _MAX_GROUPS
        or _REPEATED_GROUP.search(key)
    )


def _compiled(field: str, key: str) -> re.Pattern[str]:
    if not _is_simple(key):
        raise AdapterUnservable(
            f"{field} has the key {shown(key)}, which is too complex: at most {_MAX_LENGTH} "
            f"characters, {_MAX_REPEATS} repetitions and {_MAX_GROUPS} groups, no repeated group."
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError):
        raise AdapterUnservable(
            f"{field} has the key {shown(key)}, which is not a regular expression."
        ) from None


def _repeats(key: str) -> int:
    return len(_REPEAT.findall(key))
