"""An adapter's files out of a tar.gz or zip that nobody vouches for.

Everything is looked at before anything is written, no name in the archive becomes a path, and no
single read is large, since both formats have headers that claim any size.
"""

from __future__ import annotations

import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.sources.transfer import disk_faults
from lorafleet.cache.tokenizer_files import check_size
from lorafleet.cache.weight_files import CONFIG_FILE, adapter_files

_MAX_MEMBERS = 1000
_MAX_RATIO = 100  # unpacked to packed; trained weights hardly shrink, an untrained half vanishes
_SMALL_BYTES = 1 << 20  # what may have any ratio
_MAX_READ_BYTES = 1 << 20
_CHUNK_BYTES = 256 << 10
_TAR_OVERHEAD_BYTES = 4 << 20  # headers and padding of as many members as there may be
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError,
    ValueError, LookupError, ArithmeticError, NotImplementedError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Member:
    """A regular file in an archive."""

    path: PurePosixPath
    nbytes: int
    open: Callable[[], IO[bytes] | None]


def unpack(
    archive: Path,
    directory: Path,
    max_bytes: int,
    reserve: Callable[[int], None],
    allow_pickles: bool = False,
) -> int:
    """Writes the adapter's files into `directory`; returns their bytes.

    `reserve` is told those bytes before they are written. Raises AdapterUnservable for an archive
    that is not one, has a link, a device, a path that leads out of it, two files of a name, more
    than `max_bytes` in it or absurdly much for its size, or no adapter; and TierFull.
    """
    with _unservable_if_broken(), ExitStack() as stack:
        file = stack.enter_context(archive.open("rb"))
        magic = file.read(4)
        limit = _limit(archive.stat().st_size, max_bytes)
        if magic[:2] == b"\x1f\x8b":
            members = list(_tar_members(stack, file, limit))
        elif magic == b"PK\x03\x04":
            members = list(_zip_members(stack, file))
        else:
            raise AdapterUnservable("The archive is neither a tar.gz nor a zip.")
        chosen = _adapter_files(members, limit, allow_pickles)
        total = sum(member.nbytes for member in chosen)
        reserve(total)
        for member in chosen:
            _write(member, directory / member.path.name)
    return total


def _limit(packed_bytes: int, max_bytes: int) -> int:
    """Bytes an archive may have in it."""
    return min(max_bytes, max(_MAX_RATIO * packed_bytes, _SMALL_BYTES))


def _tar_members(stack: ExitStack, file: IO[bytes], limit: int) -> Iterator[_Member]:
    file.seek(0)
    unzipped: Any = _Guarded(stack.enter_context(gzip.GzipFile(fileobj=file)), limit)
    tar = stack.enter_context(tarfile.TarFile(fileobj=unzipped))
    for count, info in enumerate(tar):
        _check_count(count)
        _check_kind(info.name, is_plain=(info.isreg() and not info.issparse()) or info.isdir())
        if info.isreg():
            yield _Member(_path(info.name), info.size, partial(tar.extractfile, info))
    while unzipped.read(_CHUNK_BYTES):  # gzip's checksum is at the end
        pass


def _zip_members(stack: ExitStack, file: IO[bytes]) -> Iterator[_Member]:
    archive = stack.enter_context(zipfile.ZipFile(_Guarded(file)))
    for count, info in enumerate(archive.infolist()):
        _check_count(count)
        kind = stat.S_IFMT(info.external_attr >> 16)
        _check_kind(info.filename, is_plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
        if info.flag_bits & 1 or info.compress_type not in _ZIP_METHODS:
            raise AdapterUnservable(
                f"The archive has {shown(info.filename)} encrypted or in an unusual compression."
            )
        if not info.is_dir():
            yield _Member(_path(info.filename), info.file_size, partial(archive.open, info))


def _check_count(count: int) -> None:
    if count >= _MAX_MEMBERS:
        raise AdapterUnservable(f"The archive has more than {_MAX_MEMBERS} files.")


def _check_kind(name: str, is_plain: bool) -> None:
    if not is_plain:
        raise AdapterUnservable(
            f"The archive has {shown(name)}, which is neither a file nor a directory but a link, "
            "a device or the like."
        )


def _path(name: str) -> PurePosixPath:
    """The path in the archive. Raises AdapterUnservable for one that leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name:
        raise AdapterUnservable(f"The archive has {shown(name)}, which leads out of it.")
    return path


def _adapter_files(members: list[_Member], limit: int, allow_pickles: bool) -> list[_Member]:
    """Config, weights and what there is of a tokenizer, in the archive's order."""
    by_path = {member.path: member for member in members}
    if len(by_path) < len(members):
        raise AdapterUnservable("The archive has several files of one name.")
    total = sum(member.nbytes for member in members)
    if any(member.nbytes < 0 for member in members) or total > limit:
        raise AdapterUnservable(f"The archive has {total} bytes in it; it may have {limit}.")
    folder = _folder(list(by_path))
    present = {path.name for path in by_path if path.parent == folder}
    names = adapter_files(present, allow_pickles, "The archive")
    wanted = {folder / name for name in names}
    chosen = [member for member in members if member.path in wanted]
    for member in chosen:
        check_size(member.path.name, member.nbytes)
    return chosen


def _folder(paths: list[PurePosixPath]) -> PurePosixPath:
    """Where the adapter is: at the archive's top, or in one folder there."""
    folders = {path.parent for path in paths if path.name == CONFIG_FILE}
    folders = {folder for folder in folders if len(folder.parts) <= 1}
    if not folders:
        raise AdapterUnservable(
            f"The archive has no {CONFIG_FILE} at its top or in a folder there."
        )
    top = PurePosixPath()
    if top not in folders and len(folders) > 1:
        raise AdapterUnservable("The archive has several adapters; it must have one.")
    return top if top in folders else folders.pop()


def _write(member: _Member, path: Path) -> None:
    source, left = member.open(), member.nbytes
    assert source is not None  # a regular file
    with source, disk_faults(path.name), path.open("wb") as out:
        while chunk := _read(source):
            left -= len(chunk)
            out.write(chunk)
    if left:
        raise AdapterUnservable(f"The archive's {path.name} does not have the size it claims.")


def _read(source: IO[bytes]) -> bytes:
    """Errors of reading are the archive's, not the disk's that is written to."""
    with _unservable_if_broken():
        return source.read(_CHUNK_BYTES)


@contextmanager
def _unservable_if_broken() -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise AdapterUnservable(f"The archive is corrupt ({type(error).__name__}).") from None


class _Guarded:
    """A file that refuses to be read beyond a limit, or much at once."""

    def __init__(self, file: Any, limit: int | None = None) -> None:
        self._file = file
        self._limit = None if limit is None else limit + _TAR_OVERHEAD_BYTES
        self.seekable, self.tell, self.mode = file.seekable, file.tell, "rb"

    def read(self, size: int = -1) -> bytes:
        """At most a megabyte. Raises AdapterUnservable for more, or beyond the limit."""
        data: bytes = self._file.read(size if 0 <= size <= _MAX_READ_BYTES else _MAX_READ_BYTES + 1)
        if len(data) > _MAX_READ_BYTES:
            raise AdapterUnservable("The archive has a header of an absurd size.")
        self._check(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Raises AdapterUnservable beyond the limit."""
        if whence == 0:
            self._check(offset)
        position: int = self._file.seek(offset, whence)
        return position

    def _check(self, position: int) -> None:
        if self._limit is not None and position > self._limit:
            raise AdapterUnservable(
                f"The archive has more than {self._limit - _TAR_OVERHEAD_BYTES} bytes in it."
            )
