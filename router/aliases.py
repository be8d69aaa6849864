"""Aliases: names that stand for an adapter."""

from __future__ import annotations

from collections.abc import Iterator

from lorafleet.proto.messages import AdapterKey


class Aliases:
    """Owns name -> key. A name is re-pointed at once: who resolved it before keeps the old key."""

    def __init__(self) -> None:
        self._keys: dict[str, AdapterKey] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[tuple[str, AdapterKey]]:
        """Every name with its key, sorted by name."""
        return iter(sorted(self._keys.items()))

    def find(self, name: str) -> AdapterKey | None:
        """The key a name stands for; None if it is no alias."""
        return self._keys.get(name)

    def point(self, name: str, key: AdapterKey) -> None:
        """The name stands for `key` from now on."""
        self._keys[name] = key

    def remove(self, name: str) -> AdapterKey | None:
        """The name is an alias no more; the key it stood for."""
        return self._keys.pop(name, None)

    def names_of(self, key: AdapterKey) -> list[str]:
        """Every alias of an adapter, sorted."""
        return [name for name, other in self if other == key]
