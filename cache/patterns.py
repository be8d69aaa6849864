"""Regular expressions of peft's configs: they come from outside and are matched safely.

A pattern comes from whoever published the adapter, and Python's matcher holds the interpreter's
lock while it backtracks; patterns that could backtrack for long are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorafleet.cache.errors import AdapterUnservable, shown

_MAX_LENGTH = 256
_MAX_REPEATS = 3
_MAX_GROUPS = 4
_MAX_REPEATING_PATTERNS = 32
_MAX_STEPS = 1 << 22  # for one name; a step takes about ten nanoseconds
_NAME_LENGTH = 64
_NAME_PARTS = 8

_REPEAT = re.compile(r"(?<!\()\?|[*+{]")  # not the ? of (?: and its like
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
# What makes other text mean a repeated group, or hides one: inline flags (verbose mode passes over
# what stands between a group and its repetition, as comments do), names and references.
_SPECIAL_GROUP = re.compile(r"\(\?(?![:=!])|\\[1-9]")


class ModulePatterns:
    """Values by module name: the first key that matches the end of the name decides."""

    def __init__(self, field: str, values: Mapping[str, Any]) -> None:
        """Raises AdapterUnservable for a key that is no usable regular expression."""
        self._values = [(_compiled(field, key), value) for key, value in values.items()]
        if sum(_repeats(key) > 0 for key in values) > _MAX_REPEATING_PATTERNS:
            raise AdapterUnservable(
                f"{field} has more than {_MAX_REPEATING_PATTERNS} keys with repetitions."
            )
        if _NAME_PARTS * _steps(values) > _MAX_STEPS:
            raise AdapterUnservable(
                f"{field} has too many keys with repetitions or alternatives to match them in "
                "little time; name modules in full, or use fewer repetitions."
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
        or _SPECIAL_GROUP.search(key)
        or _steps([key]) > _MAX_STEPS
    )


def _compiled(field: str, key: str) -> re.Pattern[str]:
    if not _is_simple(key):
        raise AdapterUnservable(
            f"{field} has the key {shown(key)}, which is too complex: at most {_MAX_LENGTH} "
            f"characters, {_MAX_REPEATS} repetitions and {_MAX_GROUPS} groups, few alternatives, "
            "no repeated group, and after (? only a :, = or !."
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError):
        raise AdapterUnservable(
            f"{field} has the key {shown(key)}, which is not a regular expression."
        ) from None


def _repeats(key: str) -> int:
    return len(_REPEAT.findall(key))


def _steps(keys: Iterable[str]) -> int:
    """At most how many ways there are to match a name's beginning with keys that are branched."""
    return sum(map(_ways, keys))


def _ways(key: str) -> int:
    """The ways to choose each alternative and where each repetition ends; 0 where none is to."""
    repeats, bars = _repeats(key), key.count("|")
    if not repeats and not bars:
        return 0
    groups = max(1, key.count("("))
    return math.comb(_NAME_LENGTH + repeats, repeats) * math.ceil((1 + bars / groups) ** groups)
