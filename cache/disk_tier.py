"""DiskTier: downloaded adapters on this machine, shared by all of its processes.

<source>/<name>           a complete download
<source>/<name>/read.ok   the adapter in it was read: doing so once more can do no harm
.partial/<source>/<name>  one under way, or what a failure or a killed process left of it
.locks/<source>/<name>    held by whoever downloads or drops it
.room                     held while room is counted, promised, filled by a rename or given back
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from lorafleet.cache.errors import AdapterUnservable, SourceTimeout, SourceUnavailable, TierFull
from lorafleet.proto.messages import AdapterKey

_RECORD_FILE, _PARTIAL_FILE, _READ_FILE = "download.json", "partial.json", "read.ok"
_LOCKS, _PARTIAL, _ROOM = ".locks", ".partial", ".room"
_MAX_NAME_LENGTH = 200  # of the 255 bytes a file system takes
_KEEP_PARTIAL_SECONDS = 24 * 3600.0

Fill = Callable[[Path], int]  # writes a download's files into a directory, returns their bytes


@dataclass(frozen=True, slots=True)
class Download:
    """What is known of a downloaded adapter without asking its source."""

    key: AdapterKey
    commit: str  # names the content; empty = nothing does, so a part of it is worth nothing
    nbytes: int  # while it is under way: what it may need
    is_restricted: bool  # whether the source gives it to some callers only
    planned_at: float = field(default=0.0, compare=False)  # when the source was asked, Unix time


class DiskTier:
    """One directory per adapter, complete or absent: written aside, then renamed.

    What a broken download leaves aside is gone on with when its source still has that content,
    makes way when the budget needs its bytes, and is otherwise deleted by a start a day later.
    """

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self._directory, self._budget = directory, budget_bytes
        directory.mkdir(parents=True, exist_ok=True)
        with self._room():
            self._discard_idle(_KEEP_PARTIAL_SECONDS)

    def path(self, key: AdapterKey) -> Path:
        """The adapter's directory, there or not."""
        return self._directory / _name(key)

    def get(self, key: AdapterKey) -> Download | None:
        """The record of a complete download, or None."""
        record = _read_record(self.path(key) / _RECORD_FILE)
        return record if record is not None and record.key == key else None

    def was_read(self, key: AdapterKey) -> bool:
        """Whether some process has read the adapter in this download to its end."""
        return (self.path(key) / _READ_FILE).exists()

    def note_read(self, key: AdapterKey) -> None:
        """Lasts as long as the download does; nothing is noted of one that is gone."""
        with suppress(OSError):
            (self.path(key) / _READ_FILE).touch()

    def settled(self, key: AdapterKey) -> Download | None:
        """The same once nobody is downloading, replacing or dropping it."""
        with self.lock(key):
            return self.get(key)

    def list(self, source: str = "[!.]*") -> list[Download]:
        """Every complete download, whichever process made it, sorted by source and name."""
        sources = sorted(path for path in self._directory.glob(source) if path.is_dir())
        paths = (path for source in sources for path in sorted(source.iterdir()))
        records = (_read_record(path / _RECORD_FILE) for path in paths)
        return [record for record in records if record is not None]

    @contextmanager
    def lock(self, key: AdapterKey) -> Iterator[None]:
        """Held by the one process, and thread, that downloads or drops this adapter."""
        path = self._directory / _LOCKS / _name(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            try:
                yield
            finally:  # names of nothing must not pile up; who waits for a deleted lock notices
                if not self.path(key).exists() and not self._aside(key).exists():
                    path.unlink(missing_ok=True)

    def get_or_put(
        self, key: AdapterKey, plan: Callable[[], tuple[Download, Fill]], refresh: bool = False
    ) -> tuple[Download, bool]:
        """The download, made as planned if it is not there; and whether this call planned it.

        With `refresh` one from before this call is planned anew, and made if its content is
        another. Callers of one adapter share the work: the first does it, the others wait.
        """
        began = time.time()
        if not refresh and (download := self.get(key)):
            return download, False
        with self.lock(key):
            held = self.get(key)
            if held and not (refresh and held.planned_at < began):
                return held, False
            planned_at = time.time()
            planned, fill = plan()
            if held and held.commit and held.commit == planned.commit:
                held = replace(held, is_restricted=planned.is_restricted, planned_at=planned_at)
                _write_record(self.path(key) / _RECORD_FILE, held)
                return held, True
            return self.put(replace(planned, planned_at=planned_at), fill), True

    def put(self, download: Download, fill: Fill) -> Download:
        """Lets `fill` write the files aside, then makes them the adapter. The caller holds `lock`.

        `fill` finds what an earlier try left of the same content. A source that breaks off and a
        full disk leave what there is for the next try; whatever else `fill` raises leaves nothing.
        A complete download of other content stays until this one is complete, if there is room.
        """
        aside, path = self._aside(download.key), self.path(download.key)
        left = _read_record(aside / _PARTIAL_FILE)
        if left is None or not left.commit or left.commit != download.commit:
            self._delete(aside)
        try:
            self.reserve(download)
            done = replace(download, nbytes=fill(aside))
            _write_record(aside / _RECORD_FILE, done)
            path.parent.mkdir(exist_ok=True)
            with self._room():
                (aside / _PARTIAL_FILE).unlink()
                self._replace(download.key, aside)
        except (SourceUnavailable, SourceTimeout, TierFull):
            raise
        except BaseException:
            self._delete(aside)
            raise
        return done

    def reserve(self, download: Download) -> None:
        """Promises `download.nbytes` of the budget to a download whose `lock` the caller holds.

        Raises AdapterUnservable if the budget can never hold it, TierFull if it cannot now.
        """
        if download.nbytes > self._budget:
            raise AdapterUnservable(
                f"The adapter's download has {download.nbytes} bytes; "
                f"all downloads together may have {self._budget}."
            )
        with self._room():
            if self._used_besides(download.key) + download.nbytes > self._budget:
                self._discard_idle()
            if self._used_besides(download.key) + download.nbytes > self._budget:
                self._replace(download.key, None)  # what this download takes the place of
            used = self._used_besides(download.key)
            if used + download.nbytes > self._budget:
                raise TierFull(
                    f"The adapter needs {download.nbytes} bytes of disk; "
                    f"{max(0, self._budget - used)} of {self._budget} are free."
                )
            aside = self._aside(download.key)
            aside.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_record(aside / _PARTIAL_FILE, download)

    def drop(self, key: AdapterKey) -> None:
        """Deletes a download; what is not there is dropped already."""
        with self.lock(key), self._room():
            shutil.rmtree(self._aside(key), ignore_errors=True)
            self._replace(key, None)

    def _room(self) -> FileLock:
        """To hold while bytes are counted, and while any are in no record that counting reads.

        Taken after an adapter's own lock; whoever holds it waits for none.
        """
        return FileLock(self._directory / _ROOM)

    def _delete(self, aside: Path) -> None:
        with self._room():
            shutil.rmtree(aside, ignore_errors=True)

    def _replace(self, key: AdapterKey, made: Path | None) -> None:
        """Has `made`, or nothing, take the place of a download, of which no half is ever left.

        The caller holds `_room`: on the way there are bytes that no record counts.
        """
        path, aside = self.path(key), self._aside(key)
        old = aside.with_name(f"{aside.name}#old")  # the name of no adapter
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            old.parent.mkdir(parents=True, exist_ok=True)
            path.rename(old)
        if made is not None:
            made.rename(path)
        shutil.rmtree(old, ignore_errors=True)

    def _aside(self, key: AdapterKey) -> Path:
        return self._directory / _PARTIAL / _name(key)

    def _used_besides(self, key: AdapterKey) -> int:
        """Bytes of complete downloads, and bytes promised to others under way."""
        asides = (_read_record(path / _PARTIAL_FILE) for path in self._asides())
        others = (record for record in asides if record is not None and record.key != key)
        return sum(record.nbytes for record in (*self.list(), *others))

    def _asides(self) -> Iterator[Path]:
        return (self._directory / _PARTIAL).glob("*/*")

    def _discard_idle(self, min_age_seconds: float = 0.0) -> None:
        """Deletes what nobody is writing: all that cannot be gone on with, and what is old.

        The caller holds `_room`.
        """
        for aside in sorted(self._asides()):
            lock = self._directory / _LOCKS / aside.parent.name / aside.name
            lock.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout, OSError), FileLock(lock, timeout=0):
                record = aside / _PARTIAL_FILE
                is_useful = _read_record(record) is not None
                if not is_useful or time.time() - record.stat().st_mtime >= min_age_seconds:
                    shutil.rmtree(aside, ignore_errors=True)
                    lock.unlink(missing_ok=True)


def _name(key: AdapterKey) -> Path:
    """A path of this adapter only: quoting is one to one, and never makes a "#"."""
    name = f"{quote(key.id, safe='')}@{quote(key.revision, safe='')}"
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) > _MAX_NAME_LENGTH:
        name = f"{name[:100]}#{hashlib.sha256(name.encode()).hexdigest()}"
    return Path(key.source) / name


def _read_record(path: Path) -> Download | None:
    """The record, or None when there is none that this version understands."""
    try:
        fields = json.loads(path.read_bytes())
        return Download(**(fields | {"key": AdapterKey(**fields["key"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_record(path: Path, download: Download) -> None:
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        file.write(json.dumps(asdict(download)))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)  # others read it meanwhile
