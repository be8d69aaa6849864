"""JSON from outside: UTF-8, one object, and no key twice, so that every reader reads the same."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from lorafleet.cache.errors import AdapterUnservable, shown

_MIN_CONTAINER_BYTES = 16  # of honest text for each list or object in it
_FEW_CONTAINERS = 100_000


def read_object(what: str, data: bytes) -> dict[str, Any]:
    """The object that `what`, as the message calls it, is. Raises AdapterUnservable."""
    check_containers(what, data)
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except _Twice as error:
        raise AdapterUnservable(f"{what} has the key {shown(error.args[0])} twice.") from None
    except (ValueError, RecursionError):
        raise AdapterUnservable(f"{what} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise AdapterUnservable(f"{what} is not a JSON object.")
    return value


def check_containers(what: str, data: bytes) -> None:
    """Raises AdapterUnservable for a text that takes very much more memory than it has bytes."""
    # A list takes two bytes in a file and fifty times as many in memory.
    count = data.count(b"[") + data.count(b"{")
    if count > max(_FEW_CONTAINERS, len(data) // _MIN_CONTAINER_BYTES):
        raise AdapterUnservable(
            f"{what} is not valid JSON of a useful kind: it has {count} lists and objects."
        )


class _Twice(Exception):
    """An object has a key twice: some readers take the first, some the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Twice(next(key for key, count in counts.items() if count > 1))
    return made
