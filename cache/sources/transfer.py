"""Transfer: files on their way from a source to a directory, however often the way breaks off."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from lorafleet.cache.errors import AdapterFault, SourceTimeout, SourceUnavailable, TierFull
from lorafleet.cache.sources.checksum import Checksum
from lorafleet.cache.sources.source import Patience, Progress
from lorafleet.proto.messages import FetchProgress

_ATTEMPTS = 5  # per file and transfer, as long as each brings bytes that were not here before
_FIRST_WAIT_SECONDS, _MAX_WAIT_SECONDS = 0.1, 2.0
_REPORT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as its source describes it. Without a checksum only its size is verified."""

    name: str  # on this machine
    nbytes: int
    checksum: Checksum | None = None
    has_own_checksums: bool = False  # that whoever reads it will verify


@dataclass(frozen=True, slots=True)
class Body:
    """A file's content from `offset`, in chunks of whatever size arrives."""

    offset: int  # as asked for, or 0 when the source cannot go on in the middle
    chunks: Iterator[bytes]


class Remote(Protocol):
    """One adapter at its source; `name` is how messages call it."""

    @property
    def name(self) -> str: ...

    def open(self, file: RemoteFile, offset: int) -> AbstractContextManager[Body]:
        """Starts an answer with the file's content from `offset`. Raises anything."""

    def fault(self, error: Exception) -> AdapterFault:
        """What an error of the source's library means to the client."""


class Transfer:
    """Fills one directory once. What it leaves when it fails, a later one goes on with."""

    def __init__(
        self,
        remote: Remote,
        patience: Patience,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote, self._patience, self._progress, self._clock = (
            remote, patience, progress, clock,
        )  # fmt: skip
        self._deadline = clock() + patience.download_seconds
        self._done = self._reported = self._total = 0
        self._has_gained = False  # whether this attempt brought what no earlier one had

    def run(self, directory: Path, files: Sequence[RemoteFile]) -> int:
        """Writes the files and verifies their sizes and checksums; returns the bytes of all.

        Raises AdapterFault subclasses: SourceTimeout when the patience is over, SourceUnavailable
        when the source breaks off or sends other content than it said, TierFull.
        """
        self._total = sum(file.nbytes for file in files)
        for file in files:
            before = self._done
            self._bring(directory / file.name, file)
            self._done = before + file.nbytes
        self._report()
        return self._total

    def _bring(self, path: Path, file: RemoteFile) -> None:
        # On use: a shard with local adapters only, as `make gpu` starts, needs no such library.
        from tenacity import (
            Retrying,
            retry_if_exception,
            stop_after_attempt,
            wait_random_exponential,
        )

        if file.checksum is None and not file.has_own_checksums:
            path.unlink(missing_ok=True)  # nothing could tell what is in a file of another time
        before, most = self._done, 0

        def attempt() -> None:
            nonlocal most
            self._done, self._has_gained = before, False
            try:
                self._attempt(path, file)
            finally:
                size = _size(path)
                self._has_gained, most = size > most and self._has_gained, max(size, most)

        Retrying(
            retry=retry_if_exception(self._is_worth_another),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=_FIRST_WAIT_SECONDS, max=_MAX_WAIT_SECONDS),
            reraise=True,
        )(attempt)

    def _attempt(self, path: Path, file: RemoteFile) -> None:
        if _size(path) > file.nbytes:
            path.unlink()
        if _size(path) < file.nbytes or not path.exists():
            self._receive(path, file)
        with disk_faults(self._remote.name):
            is_right = file.checksum is None or file.checksum.matches(path)
        if not is_right:
            path.unlink()
            self._has_gained = False
            raise SourceUnavailable(
                f"{file.name} of {self._remote.name} arrived with other content than its source "
                "says it has."
            )

    def _receive(self, path: Path, file: RemoteFile) -> None:
        try:
            with self._remote.open(file, _size(path)) as body:
                self._save(path, file, body)
        except AdapterFault:
            raise
        except Exception as error:
            raise self._remote.fault(error) from None
        if _size(path) < file.nbytes:
            raise SourceUnavailable(f"The source broke off in the middle of {self._remote.name}.")

    def _save(self, path: Path, file: RemoteFile, body: Body) -> None:
        with disk_faults(self._remote.name):
            out = path.open("r+b" if path.exists() else "wb")
        with out:
            out.truncate(body.offset)
            out.seek(body.offset)
            self._done += body.offset
            left = file.nbytes - body.offset
            for chunk in body.chunks:
                left -= len(chunk)
                if left < 0:
                    raise SourceUnavailable(
                        f"The source sent more of {self._remote.name} than it said."
                    )
                self._write(out, chunk)
            with disk_faults(self._remote.name):
                os.fsync(out.fileno())

    def _write(self, out: BinaryIO, chunk: bytes) -> None:
        with disk_faults(self._remote.name):
            out.write(chunk)
            out.flush()  # what has come is there for another process if this one is killed
        self._done += len(chunk)
        self._has_gained = True
        if self._done - self._reported >= _REPORT_BYTES:
            self._report()
        if self._clock() > self._deadline:
            raise SourceTimeout(
                f"{self._remote.name} did not arrive within "
                f"{self._patience.download_seconds:g} seconds; the next request goes on from here."
            )

    def _report(self) -> None:
        self._reported = self._done
        self._progress(FetchProgress("downloading", self._done, self._total))

    def _is_worth_another(self, error: BaseException) -> bool:
        is_passing = isinstance(error, SourceUnavailable | SourceTimeout)
        return is_passing and self._has_gained and self._clock() <= self._deadline


def ranged_offset(status: int, content_range: str, asked: int) -> int:
    """Where an HTTP answer's content starts: `asked` for a 206, 0 for a whole file.

    Raises SourceUnavailable for a range nobody asked for.
    """
    if status != 206:
        return 0
    if content_range.startswith(f"bytes {asked}-"):
        return asked
    raise SourceUnavailable("The source answered with another range than it was asked for.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def disk_faults(name: str) -> Iterator[None]:
    """This machine's disk has errors too, and they are not the source's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TierFull(f"The disk has no room left for {name}.") from None
        raise SourceUnavailable(
            f"{name} cannot be written to this machine's disk: {error.strerror}."
        ) from None
