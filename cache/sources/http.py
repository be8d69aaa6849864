"""HttpSource: adapters as archives on the web servers the operator allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests

from lorafleet.cache.disk_tier import DiskTier, Download, Fill
from lorafleet.cache.errors import (
    AdapterFault,
    AdapterForbidden,
    AdapterNotFound,
    AdapterUnservable,
    SourceTimeout,
    SourceUnavailable,
    shown,
)
from lorafleet.cache.sources.archive import unpack
from lorafleet.cache.sources.checksum import Checksum
from lorafleet.cache.sources.downloads import Downloads
from lorafleet.cache.sources.http_url import AllowedHosts, ArchiveUrl
from lorafleet.cache.sources.source import Patience, Progress
from lorafleet.cache.sources.transfer import Body, RemoteFile, Transfer, ranged_offset
from lorafleet.proto.messages import AdapterKey

SOURCE = "http"

_ARCHIVE_FILE = "archive"
_CHUNK_BYTES = 64 << 10
_MAX_REDIRECTS = 5


class HttpSource(Downloads):
    """`id` is the URL of a tar.gz or zip, with `#sha256=` and the archive's hash where it is known.

    Nothing of the caller's is sent: no token, no cookie, no name.
    """

    def __init__(
        self,
        disk: DiskTier,
        hosts: Iterable[str],
        max_bytes: int,
        patience: Patience | None = None,
        allow_pickles: bool = False,
    ) -> None:
        """`max_bytes`: of an archive, and of what is in it. Raises ValueError for a bad host."""
        super().__init__(disk, SOURCE)
        self._hosts, self._max_bytes = AllowedHosts(hosts), max_bytes
        self._patience, self._allow_pickles = patience or Patience(), allow_pickles

    def fetch(
        self, key: AdapterKey, api_token: str, progress: Progress, refresh: bool = False
    ) -> Path:
        """Downloads and unpacks unless that is done; see AdapterFault for what it raises."""
        url = ArchiveUrl.parse(key)
        self._hosts.check(url)
        self._disk.get_or_put(key, lambda: self._plan(key, url, progress), refresh)
        return self._disk.path(key)

    def authorize(self, key: AdapterKey, api_token: str) -> None:
        """Everyone may use what an allowed host gives to everyone."""

    def _plan(self, key: AdapterKey, url: ArchiveUrl, progress: Progress) -> tuple[Download, Fill]:
        remote = _Archive(key, url, self._hosts, self._patience)
        nbytes = remote.look()
        if nbytes > self._max_bytes:
            raise AdapterUnservable(
                f"{remote.name} has {nbytes} bytes; --adapter-archive-bytes allows "
                f"{self._max_bytes}."
            )
        download = Download(key, url.sha256 or remote.tag, nbytes, False)
        transfer = Transfer(remote, self._patience, progress)

        def fill(directory: Path) -> int:
            archive = directory / _ARCHIVE_FILE
            # Its checksums are inside: an archive without a tag is asked for from its beginning.
            file = RemoteFile(_ARCHIVE_FILE, nbytes, has_own_checksums=bool(download.commit))
            transfer.run(directory, [file])
            _check_hash(remote.name, archive, url.sha256)
            total = unpack(
                archive,
                directory,
                self._max_bytes,
                lambda total: self._disk.reserve(replace(download, nbytes=nbytes + total)),
                self._allow_pickles,
            )
            archive.unlink()
            return total

        return download, fill


class _Archive:
    """One archive on a web server; what it was when it was looked at is what is downloaded."""

    def __init__(
        self, key: AdapterKey, url: ArchiveUrl, hosts: AllowedHosts, patience: Patience
    ) -> None:
        self.name = shown(key.id)
        self.tag = ""  # a validator of HTTP for its content; empty = the server gives none
        self._url, self._hosts, self._seconds = url, hosts, patience.answer_seconds
        self._session = requests.Session()
        self._session.auth = _no_auth

    def look(self) -> int:
        """Bytes of the archive, asked for with its first one. Raises AdapterFault."""
        try:
            with self._get({"Range": "bytes=0-0"}) as response:
                size = _total_size(response)
        except AdapterFault:
            raise
        except Exception as error:
            raise self.fault(error) from None
        if size is None:
            raise AdapterUnservable(f"The server does not say how large {self.name} is.")
        self.tag = _tag(response)
        return size

    @contextmanager
    def open(self, file: RemoteFile, offset: int) -> Iterator[Body]:
        """Streams the archive as the server stores it."""
        headers = {"Range": f"bytes={offset}-", "If-Range": self.tag} if offset and self.tag else {}
        with self._get(headers) as response:
            if _tag(response) != self.tag:  # also where a server takes no heed of If-Range
                raise SourceUnavailable(f"{self.name} changed while it was downloaded.")
            content_range = response.headers.get("Content-Range", "")
            start = ranged_offset(response.status_code, content_range, offset)
            yield Body(start, iter(lambda: _read(response.raw), b""))

    def fault(self, error: Exception) -> AdapterFault:
        """An error of the HTTP client."""
        if any("Timeout" in kind.__name__ for kind in type(error).__mro__):
            return SourceTimeout(f"The server took too long to answer for {self.name}.")
        return SourceUnavailable(
            f"The server cannot be reached for {self.name}, or broke off ({type(error).__name__})."
        )

    @contextmanager
    def _get(self, headers: dict[str, str]) -> Iterator[requests.Response]:
        """The answer to a GET, redirects followed as far as the operator allows their hosts."""
        url = self._url
        for _ in range(1 + _MAX_REDIRECTS):
            with self._session.get(
                str(url),
                headers={"Accept-Encoding": "identity", **headers},
                timeout=self._seconds,
                stream=True,
                allow_redirects=False,
            ) as response:
                location = self._session.get_redirect_target(response)
                if location is None:
                    self._check_status(response.status_code)
                    yield response
                    return
            url = self._redirected(url, location)
        raise SourceUnavailable(f"{self.name} is redirected more than {_MAX_REDIRECTS} times.")

    def _redirected(self, url: ArchiveUrl, location: str) -> ArchiveUrl:
        """Where to look next; the location itself is never shown, since it may hold a secret."""
        target = url.joined(location)
        if target is None or (url.scheme, target.scheme) == ("https", "http"):
            raise AdapterForbidden(f"{self.name} is redirected to what is no HTTPS URL.")
        try:
            self._hosts.check(target)
        except AdapterForbidden as error:
            raise AdapterForbidden(f"{self.name} is redirected elsewhere: {error}") from None
        return target

    def _check_status(self, status: int) -> None:
        if status in (200, 206):
            return
        if status in (401, 403):
            raise AdapterForbidden(f"The server does not give {self.name} to everyone.")
        if status in (404, 410):
            raise AdapterNotFound(f"The server has no {self.name}.")
        if status == 416:
            raise AdapterUnservable(f"{self.name} is empty.")
        raise SourceUnavailable(f"The server answered {status} for {self.name}; try again later.")


def _total_size(response: requests.Response) -> int | None:
    """Bytes of the whole file, or None when the server does not say."""
    if response.status_code == 206:
        text = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _tag(response: requests.Response) -> str:
    """The strongest name the server gives the content, or an empty one."""
    tag = response.headers.get("ETag", "")
    is_strong = bool(tag) and not tag.startswith("W/")
    return tag if is_strong else response.headers.get("Last-Modified", "")


def _read(raw: Any) -> bytes:
    """What has arrived, at most a chunk, as it was sent: not even gzip is undone."""
    data: bytes = raw.read1(_CHUNK_BYTES, decode_content=False)
    return data


def _check_hash(name: str, archive: Path, sha256: str) -> None:
    if sha256 and not Checksum("sha256", sha256).matches(archive):
        raise AdapterUnservable(f"{name} has another SHA-256 than the one in its URL.")


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from sending what a .netrc file has for the host."""
    return request
