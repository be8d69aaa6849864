"""A request body's fields, read with type and range; every refusal names field and range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lorafleet.router.errors import InvalidRequest

D = TypeVar("D")

_MAX_SHOWN = 40  # characters of a refused value in the message


class Fields:
    """One JSON object. A field that is null counts as absent; unknown fields are ignored.

    Every reader raises InvalidRequest for a value of another type or out of range.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.read_names: set[str] = set()  # what readers asked for, there or not

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw(name) is not None

    def with_value(self, name: str, value: Any) -> Fields:
        """The same fields but for one."""
        return Fields({**self._values, name: value})

    def named(self, prefix: str) -> Fields:
        """The same fields, each called `prefix.name`, as refusals of an inner object's call it."""
        return Fields({f"{prefix}.{name}": value for name, value in self._values.items()})

    def raw(self, name: str) -> Any:
        """The field as JSON gave it; None when absent."""
        self.read_names.add(name)
        return self._values.get(name)

    def integer(self, name: str, default: D, low: int, high: int) -> int | D:
        """A whole number in [low, high]."""
        value = self.raw(name)
        if value is None:
            return default
        if not _is_integer(value) or not low <= value <= high:
            raise refusal(name, f"an integer between {low} and {high}", value)
        return int(value)

    def number(
        self, name: str, default: float, low: float, high: float, *, above_low: bool = False
    ) -> float:
        """A finite number in [low, high], or in (low, high]."""
        value = self.raw(name)
        if value is None:
            return default
        if not _is_number(value) or not low <= value <= high or (above_low and value == low):
            wanted = f"> {low:g} and <= {high:g}" if above_low else f"between {low:g} and {high:g}"
            raise refusal(name, f"a number {wanted}", value)
        return float(value)

    def numbers(self, name: str, count: int, low: float, high: float) -> list[float]:
        """A list of exactly `count` finite numbers in [low, high]; required."""
        values = self.required(name)
        if not isinstance(values, list) or len(values) != count:
            raise refusal(name, f"a list of {count} numbers", values)
        for value in values:
            if not _is_number(value) or not low <= value <= high:
                raise refusal(name, f"numbers between {low:g} and {high:g}", value)
        return [float(value) for value in values]

    def boolean(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise refusal(name, "true or false", value)
        return value

    def string(self, name: str, default: D) -> str | D:
        """A string of whole Unicode characters."""
        value = self.raw(name)
        return default if value is None else check_string(name, value)

    def strings(self, name: str, max_count: int) -> list[str]:
        """A list of at most `max_count` non-empty strings; a string alone is a list of one."""
        value = self.raw(name)
        if value is None:
            return []
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or len(items) > max_count:
            raise refusal(name, f"a string or a list of at most {max_count} strings", value)
        strings = [check_string(name, item) for item in items]
        if "" in strings:
            raise InvalidRequest(f"`{name}` must hold no empty string", name)
        return strings

    def object(self, name: str) -> Fields | None:
        """A JSON object; None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise refusal(name, "an object", value)
        return Fields(value)

    def required(self, name: str) -> Any:
        """The field as JSON gave it; refused when absent."""
        if not self.has(name):
            raise InvalidRequest(f"`{name}` is required", name)
        return self._values[name]

    def unsupported(self, *names: str) -> None:
        """Refuses what would change the answer and cannot be honoured; empty values pass."""
        for name in names:
            if self.raw(name):
                raise InvalidRequest(f"`{name}` is not supported yet", name)


def check_string(name: str, value: Any) -> str:
    """`value` if it is a string of whole characters; JSON can spell half of a surrogate pair."""
    if not isinstance(value, str):
        raise refusal(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"`{name}` holds half of a surrogate pair", name) from None
    return value


def refusal(name: str, wanted: str, value: Any) -> InvalidRequest:
    """The error for a field that is not what it must be."""
    return InvalidRequest(f"`{name}` must be {wanted}, got {_shown(value)}", name)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Numbers as they are, containers by what they are: a message is no place for a prompt."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if _is_integer(value) and abs(value) >= 10**_MAX_SHOWN:
        return "a larger number"
    return ascii(value)[:_MAX_SHOWN]
