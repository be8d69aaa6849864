"""AdapterSource: what the store asks of a place that has adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorafleet.proto.messages import AdapterKey, FetchProgress

Progress = Callable[[FetchProgress], None]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a remote source may take, in seconds."""

    answer_seconds: float = 10.0  # to accept a connection, and for each next piece of an answer
    download_seconds: float = 600.0  # for an adapter's files altogether


class AdapterSource(Protocol):
    """Every method is thread-safe and raises AdapterFault subclasses for what the world does."""

    def fetch(
        self, key: AdapterKey, api_token: str, progress: Progress, refresh: bool = False
    ) -> Path:
        """A directory on this machine with the adapter's files, once this caller may have them.

        With `refresh` the files the source has now; else those of an earlier download will do.
        """

    def authorize(self, key: AdapterKey, api_token: str) -> None:
        """Raises AdapterForbidden or AdapterNotFound unless this caller may use a held adapter."""

    def disk_bytes(self, key: AdapterKey) -> int:
        """Bytes the adapter takes of the disk budget."""

    def drop(self, key: AdapterKey) -> None:
        """Forgets the copy on this machine, where it is one."""

    def was_read(self, key: AdapterKey) -> bool:
        """Whether reading the adapter, as it is here now, is known to end."""

    def note_read(self, key: AdapterKey) -> None:
        """The adapter, as it is here now, was read."""

    def list(self) -> list[tuple[AdapterKey, Path]]:
        """Adapters anyone may use without a remote source being asked."""

    def list_restricted(self) -> Sequence[AdapterKey]:
        """Adapters on this machine that their source gives to some callers only."""
