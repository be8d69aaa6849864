"""LocalSource: adapters the operator put under one directory. Nothing outside it is ever read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorafleet.cache.errors import AdapterNotFound, shown
from lorafleet.cache.sources import local_id
from lorafleet.cache.sources.source import Progress
from lorafleet.cache.weight_files import CONFIG_FILE, is_adapter_file
from lorafleet.proto.messages import AdapterKey

SOURCE = local_id.SOURCE

_LIST_DEPTH = 2  # root/name and root/owner/name


class LocalSource:
    """`id` is a path under the root (local_id.py); there are no revisions and no tokens."""

    def __init__(self, root: str) -> None:
        """An empty root refuses every adapter."""
        self._root = Path(_real(root)) if root else None

    def fetch(
        self, key: AdapterKey, api_token: str, progress: Progress, refresh: bool = False
    ) -> Path:
        """The adapter's directory. Raises AdapterNotFound; the answer does not tell why."""
        if self._root is None:
            raise AdapterNotFound("Local adapters are not served here: no adapter root is set.")
        if key.revision:
            raise AdapterNotFound(
                f"The local adapter {shown(key.id)} has no revision {shown(key.revision)}: "
                "local adapters have none."
            )
        directory = self._inside(key.id) if local_id.is_local_id(key.id) else None
        if directory is None or directory == self._root or not os.path.isdir(directory):
            raise AdapterNotFound(f"There is no local adapter {shown(key.id)}.")
        for name in filter(is_adapter_file, _names(directory)):
            if self._inside(str(directory / name)) is None:
                raise AdapterNotFound(f"There is no local adapter {shown(key.id)}.")
        return directory

    def authorize(self, key: AdapterKey, api_token: str) -> None:
        """Everyone may use what the operator put here."""

    def disk_bytes(self, key: AdapterKey) -> int:
        """None: the directory is the operator's."""
        return 0

    def drop(self, key: AdapterKey) -> None:
        """Nothing is forgotten: the directory is the operator's."""

    def was_read(self, key: AdapterKey) -> bool:
        """Always: what the operator put here may be read."""
        return True

    def note_read(self, key: AdapterKey) -> None:
        """Nothing is written: the directory is the operator's."""

    def list(self) -> list[tuple[AdapterKey, Path]]:
        """Every directory with an adapter's config, at most two levels under the root."""
        if self._root is None:
            return []
        found: list[tuple[AdapterKey, Path]] = []
        for path, directories, files in os.walk(self._root):
            name = Path(path).relative_to(self._root)
            is_adapter = CONFIG_FILE in files and bool(name.parts)
            if is_adapter and name.as_posix().isprintable():  # no request can name the others
                found.append((AdapterKey(SOURCE, name.as_posix()), Path(path)))
            if is_adapter or len(name.parts) >= _LIST_DEPTH:
                directories.clear()  # checkpoints inside an adapter are not listed
            directories.sort()
        return found

    def list_restricted(self) -> Sequence[AdapterKey]:
        """None: everyone may use what the operator put here."""
        return []

    def _inside(self, path: str) -> Path | None:
        """The real path, every link followed, or None when it is not under the root."""
        assert self._root is not None
        try:
            real = Path(os.path.realpath(self._root / path))
            return real if real.is_relative_to(self._root) else None
        except (OSError, ValueError, RuntimeError):
            return None


def root_paths(root: str) -> list[str]:
    """Absolute paths of the root: as the operator named it, and with every link followed."""
    if not root:
        return []
    named, real = os.path.abspath(Path(root).expanduser()), _real(root)
    # With a link in front of it, a ".." that is taken out would have led elsewhere.
    paths = [path for path in (named, real) if os.path.realpath(path) == real]
    # No request can name the others, nor the wire hold each.
    return [path for path in dict.fromkeys(paths) if path.isprintable()]


def _real(root: str) -> str:
    return os.path.realpath(Path(root).expanduser())


def _names(directory: Path) -> list[str]:
    """What is in a directory; nothing where it cannot be read, which whoever reads it will tell."""
    try:
        return os.listdir(directory)
    except OSError:
        return []
