"""HubSource: adapters of the Hugging Face Hub, or of a server that speaks its API.

The caller's token goes along with the caller's requests and nowhere else: the machine's own token
is never used, nothing keeps the caller's, and no message or log holds it. Messages are written
here; the library's are dropped, since they quote what was sent.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorafleet.cache.adapter_files import WEIGHTS_FILE
from lorafleet.cache.disk_tier import DiskTier, Download
from lorafleet.cache.errors import (
    AdapterFault,
    AdapterForbidden,
    AdapterNotFound,
    AdapterUnservable,
    SourceTimeout,
    SourceUnavailable,
    TierFull,
    shown,
)
from lorafleet.cache.peft_config import CONFIG_FILE
from lorafleet.cache.sources.source import Progress
from lorafleet.proto.messages import AdapterKey, FetchProgress

SOURCE = "hub"

_CHUNK_BYTES = 1 << 20
_REPO_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_MAX_ID_LENGTH = 96
_MAX_REVISION_LENGTH = 120  # as quoted: it becomes part of a directory's name


class HubSource:
    """`id` is a repository, `revision` a commit, branch or tag; empty is the default branch."""

    def __init__(self, disk: DiskTier, endpoint: str | None, timeout_seconds: float = 10.0) -> None:
        """`endpoint`: base URL, None for what HF_ENDPOINT says; the timeout is for each answer."""
        self._disk, self._endpoint, self._timeout = disk, endpoint, timeout_seconds

    def fetch(self, key: AdapterKey, api_token: str, progress: Progress) -> Path:
        """Downloads unless the files are here already; see AdapterFault for what it raises."""
        _check_token(api_token)
        _check_key(key)
        download = self._disk.get(key)
        if download is None:
            download = self._download(key, api_token, progress)
        if download is not None:  # not by this caller's request: it may not be theirs
            self._check_access(download, api_token)
        return self._disk.path(key)

    def authorize(self, key: AdapterKey, api_token: str) -> None:
        """Asks the hub whether this caller can read the adapter, if not everyone can."""
        _check_token(api_token)
        download = self._disk.get(key)
        if download is None:
            raise AdapterNotFound(f"{shown(str(key))} is not here any more; fetch it again.")
        self._check_access(download, api_token)

    def disk_bytes(self, key: AdapterKey) -> int:
        """The download's size."""
        download = self._disk.get(key)
        return download.nbytes if download else 0

    def drop(self, key: AdapterKey) -> None:
        """Deletes the download."""
        self._disk.drop(key)

    def list(self) -> list[tuple[AdapterKey, Path]]:
        """Downloads that are public; the others need the hub's word for each caller."""
        found = [download for download in self._disk.list() if not download.is_restricted]
        return [(download.key, self._disk.path(download.key)) for download in found]

    def _check_access(self, download: Download, api_token: str) -> None:
        if not download.is_restricted:
            return
        url = hf_hub_url(
            download.key.id, CONFIG_FILE, revision=download.commit, endpoint=self._endpoint
        )
        try:
            get_hf_file_metadata(url, token=api_token or False, timeout=self._timeout)
        except Exception as error:
            raise _fault(download.key, error) from None

    def _download(self, key: AdapterKey, api_token: str, progress: Progress) -> Download | None:
        """None once this call has downloaded; the record when another one was quicker."""
        with self._disk.lock(key):
            if download := self._disk.get(key):
                return download
            info = self._repository(key, api_token)
            sizes = _sizes(key, info)
            total = sum(sizes.values())
            self._disk.check_room(total)
            download = Download(key, info.sha, total, _is_restricted(info))
            transfer = _Transfer(self._endpoint, self._timeout, download, api_token, progress)
            self._disk.put(download, lambda directory: transfer.run(directory, list(sizes)))
        return None

    def _repository(self, key: AdapterKey, api_token: str) -> Any:
        try:
            info = HfApi(endpoint=self._endpoint).model_info(
                key.id,
                revision=key.revision or None,
                files_metadata=True,
                timeout=self._timeout,
                token=api_token or False,
            )
        except Exception as error:
            raise _fault(key, error) from None
        if not isinstance(info.sha, str):
            raise SourceUnavailable(f"The hub did not say which commit {shown(str(key))} is.")
        return info


class _Transfer:
    """One adapter's files on their way from the hub to a directory."""

    def __init__(
        self,
        endpoint: str | None,
        timeout: float,
        download: Download,
        api_token: str,
        progress: Progress,
    ) -> None:
        self._endpoint, self._timeout, self._download = endpoint, timeout, download
        self._headers = {"Accept-Encoding": "identity"}
        if api_token:
            self._headers["Authorization"] = f"Bearer {api_token}"
        self._progress, self._done = progress, 0

    def run(self, directory: Path, names: list[str]) -> None:
        """Writes the files. Raises AdapterFault subclasses."""
        for name in names:
            try:
                self._file(directory / name)
            except AdapterFault:
                raise
            except Exception as error:
                raise _fault(self._download.key, error) from None

    def _file(self, path: Path) -> None:
        """Streams one file, so that it needs neither the hub's cache nor its transfer services."""
        key, commit = self._download.key, self._download.commit
        url = hf_hub_url(key.id, path.name, revision=commit, endpoint=self._endpoint)
        with (
            get_session().stream(
                "GET", url, headers=self._headers, timeout=self._timeout, follow_redirects=True
            ) as response,
            path.open("wb") as file,
        ):
            hf_raise_for_status(response)
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                self._done += len(chunk)
                if self._done > self._download.nbytes:
                    raise SourceUnavailable(f"The hub sent more of {shown(key.id)} than it said.")
                file.write(chunk)
                self._progress(FetchProgress("downloading", self._done, self._download.nbytes))


def _check_token(api_token: str) -> None:
    if not (api_token.isascii() and api_token.isprintable() and " " not in api_token):
        raise AdapterForbidden("The API token holds characters that no token has.")


def _check_key(key: AdapterKey) -> None:
    """Raises AdapterNotFound for what cannot be on the hub, nor be a directory's name."""
    if len(key.id) > _MAX_ID_LENGTH or not _REPO_ID.fullmatch(key.id):
        raise AdapterNotFound(f"{shown(key.id)} is not the name of a hub repository.")
    if len(quote(key.revision, safe="")) > _MAX_REVISION_LENGTH:
        raise AdapterNotFound(f"{shown(key.id)} has no revision {shown(key.revision)}.")


def _sizes(key: AdapterKey, info: Any) -> dict[str, int]:
    """Bytes of the files to download, config first."""
    present = {file.rfilename: file.size for file in info.siblings or []}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in present:
            raise AdapterUnservable(f"{shown(str(key))} has no {name}.")
        if type(present[name]) is not int or present[name] < 0:
            raise SourceUnavailable(f"The hub did not say how large {name} of {shown(key.id)} is.")
    return {name: present[name] for name in (CONFIG_FILE, WEIGHTS_FILE)}


def _is_restricted(info: Any) -> bool:
    """Whether the hub gives the repository to some callers only, as far as it says."""
    return info.private is not False or bool(info.gated)


def _fault(key: AdapterKey, error: Exception) -> AdapterFault:
    """What an error of the hub's library, of its HTTP client or of the disk means to the client."""
    name = shown(str(key))
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, (GatedRepoError, DisabledRepoError)):
        return AdapterForbidden(f"The hub does not let this token read {name}.")
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)):
        return AdapterNotFound(f"The hub has no {name}, or not for this token.")
    if isinstance(error, HFValidationError):
        return AdapterNotFound(f"{shown(key.id)} is not the name of a hub repository.")
    if status in (401, 403):
        return AdapterForbidden(f"The hub does not let this token read {name}.")
    if status in (400, 404):
        return AdapterNotFound(f"The hub has no {name}, or not for this token.")
    if status:
        return SourceUnavailable(f"The hub answered {status} for {name}; try again later.")
    if any("Timeout" in kind.__name__ for kind in type(error).__mro__):
        # httpx's in versions 1 of the library, httpx2's in versions 2: only the name is the same.
        return SourceTimeout(f"The hub took too long to answer for {name}.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TierFull(f"The disk has no room left for {name}.")
    return SourceUnavailable(f"The hub cannot be reached for {name} ({type(error).__name__}).")
