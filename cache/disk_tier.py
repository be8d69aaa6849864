"""DiskTier: downloaded adapters on this machine, shared by all of its processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from lorafleet.cache.errors import AdapterUnservable, TierFull
from lorafleet.proto.messages import AdapterKey

_RECORD_FILE = "download.json"
_LOCKS = ".locks"


@dataclass(frozen=True, slots=True)
class Download:
    """What is known of a downloaded adapter without asking its source."""

    key: AdapterKey
    commit: str  # what the key's revision was when it was downloaded
    nbytes: int
    is_restricted: bool  # whether the source gives it to some callers only


class DiskTier:
    """One directory per adapter, complete or absent: written aside, then renamed."""

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self._directory, self._budget = directory, budget_bytes
        (directory / _LOCKS).mkdir(parents=True, exist_ok=True)

    def path(self, key: AdapterKey) -> Path:
        """The adapter's directory, there or not."""
        return self._directory / _name(key)

    def get(self, key: AdapterKey) -> Download | None:
        """The record of a complete download, or None."""
        return _read_record(self.path(key))

    def list(self) -> list[Download]:
        """Every complete download, whichever process made it."""
        with os.scandir(self._directory) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        records = (_read_record(self._directory / name) for name in names)
        return [record for record in records if record is not None]

    @contextmanager
    def lock(self, key: AdapterKey) -> Iterator[None]:
        """Held by the one process, and thread, that downloads or drops this adapter."""
        with FileLock(self._directory / _LOCKS / _name(key)):
            yield

    def check_room(self, nbytes: int) -> None:
        """Raises AdapterUnservable if the budget can never hold it, TierFull if it cannot now."""
        if nbytes > self._budget:
            raise AdapterUnservable(
                f"The adapter's download has {nbytes} bytes; "
                f"all downloads together may have {self._budget}."
            )
        used = sum(download.nbytes for download in self.list())
        if used + nbytes > self._budget:
            raise TierFull(
                f"The adapter needs {nbytes} bytes of disk; "
                f"{max(0, self._budget - used)} of {self._budget} are free."
            )

    def put(self, download: Download, fill: Callable[[Path], None]) -> None:
        """Lets `fill` write the files aside, then makes them the adapter. The caller holds `lock`.

        Whatever `fill` raises leaves nothing behind.
        """
        aside = self._directory / f".{_name(download.key)}"
        for leftover in (aside, self.path(download.key)):  # of a process that died, or is older
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            aside.mkdir(mode=0o700)
            fill(aside)
            (aside / _RECORD_FILE).write_text(json.dumps(asdict(download)))
            aside.rename(self.path(download.key))
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def drop(self, key: AdapterKey) -> None:
        """Deletes a download; what is not there is dropped already."""
        with self.lock(key):
            aside = self._directory / f".{_name(key)}"
            shutil.rmtree(aside, ignore_errors=True)
            if self.path(key).exists():
                self.path(key).rename(aside)
                shutil.rmtree(aside, ignore_errors=True)


def _name(key: AdapterKey) -> str:
    return f"{quote(key.id, safe='')}@{quote(key.revision, safe='')}"


def _read_record(directory: Path) -> Download | None:
    """The record, or None when there is none that this version understands."""
    try:
        fields = json.loads((directory / _RECORD_FILE).read_bytes())
        return Download(**(fields | {"key": AdapterKey(**fields["key"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None
