"""HubSource: adapters of the Hugging Face Hub, or of a server that speaks its API.

The caller's token goes along with the caller's requests and nowhere else: the machine's own token
is never used, nothing keeps the caller's, and no message or log holds it. Messages are written
here; the library's are dropped, since they quote what was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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

from lorafleet.cache.disk_tier import DiskTier, Download, Fill
from lorafleet.cache.errors import (
    AdapterFault,
    AdapterForbidden,
    AdapterNotFound,
    SourceTimeout,
    SourceUnavailable,
    shown,
)
from lorafleet.cache.peft_config import check_config_size
from lorafleet.cache.sources.checksum import Checksum
from lorafleet.cache.sources.downloads import Downloads
from lorafleet.cache.sources.source import Patience, Progress
from lorafleet.cache.sources.transfer import Body, RemoteFile, Transfer, ranged_offset
from lorafleet.cache.tokenizer_files import check_size
from lorafleet.cache.weight_files import CONFIG_FILE, adapter_files
from lorafleet.proto.messages import AdapterKey

SOURCE = "hub"

_REPO_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_MAX_ID_LENGTH = 96
_MAX_REVISION_LENGTH = 120  # as quoted: it becomes part of a directory's name


class HubSource(Downloads):
    """`id` is a repository, `revision` a commit, branch or tag; empty is the default branch."""

    def __init__(
        self,
        disk: DiskTier,
        endpoint: str | None = None,
        patience: Patience | None = None,
        allow_pickles: bool = False,
    ) -> None:
        """`endpoint`: base URL, None for what HF_ENDPOINT says."""
        super().__init__(disk, SOURCE)
        self._endpoint, self._patience = endpoint, patience or Patience()
        self._allow_pickles = allow_pickles

    def fetch(
        self, key: AdapterKey, api_token: str, progress: Progress, refresh: bool = False
    ) -> Path:
        """Downloads unless the files are here already; see AdapterFault for what it raises."""
        _check_token(api_token)
        _check_key(key)
        download, is_mine = self._disk.get_or_put(
            key, lambda: self._plan(key, api_token, progress), refresh
        )
        if not is_mine:  # not by this caller's request: it may not be theirs
            self._check_access(download, api_token)
        return self._disk.path(key)

    def authorize(self, key: AdapterKey, api_token: str) -> None:
        """Asks the hub whether this caller can read the adapter, if not everyone can."""
        _check_token(api_token)
        download = self._disk.get(key) or self._disk.settled(key)
        if download is None:
            raise AdapterNotFound(f"{shown(str(key))} is not here any more; fetch it again.")
        self._check_access(download, api_token)

    def _check_access(self, download: Download, api_token: str) -> None:
        if not download.is_restricted:
            return
        url = hf_hub_url(
            download.key.id, CONFIG_FILE, revision=download.commit, endpoint=self._endpoint
        )
        try:
            get_hf_file_metadata(
                url, token=api_token or False, timeout=self._patience.answer_seconds
            )
        except Exception as error:
            raise _fault(download.key, error) from None

    def _plan(self, key: AdapterKey, api_token: str, progress: Progress) -> tuple[Download, Fill]:
        info = self._repository(key, api_token)
        files = _files(key, info, self._allow_pickles)
        download = Download(key, info.sha, sum(f.nbytes for f in files), _is_restricted(info))
        remote = _Repository(key, info.sha, api_token, self._endpoint, self._patience)
        transfer = Transfer(remote, self._patience, progress)
        return download, lambda directory: transfer.run(directory, files)

    def _repository(self, key: AdapterKey, api_token: str) -> Any:
        try:
            info = HfApi(endpoint=self._endpoint).model_info(
                key.id,
                revision=key.revision or None,
                files_metadata=True,
                timeout=self._patience.answer_seconds,
                token=api_token or False,
            )
        except Exception as error:
            raise _fault(key, error) from None
        if not isinstance(info.sha, str):
            raise SourceUnavailable(f"The hub did not say which commit {shown(str(key))} is.")
        return info


class _Repository:
    """One commit of a repository, read with one caller's token."""

    def __init__(
        self,
        key: AdapterKey,
        commit: str,
        api_token: str,
        endpoint: str | None,
        patience: Patience,
    ) -> None:
        self.name = shown(str(key))
        self._key, self._commit, self._endpoint, self._patience = key, commit, endpoint, patience
        self._headers = {"Accept-Encoding": "identity"}
        if api_token:
            self._headers["Authorization"] = f"Bearer {api_token}"

    @contextmanager
    def open(self, file: RemoteFile, offset: int) -> Iterator[Body]:
        """Streams one file, so that it needs neither the hub's cache nor its transfer services."""
        url = hf_hub_url(self._key.id, file.name, revision=self._commit, endpoint=self._endpoint)
        headers = self._headers | ({"Range": f"bytes={offset}-"} if offset else {})
        with get_session().stream(
            "GET",
            url,
            headers=headers,
            timeout=self._patience.answer_seconds,
            follow_redirects=True,
        ) as response:
            hf_raise_for_status(response)
            content_range = response.headers.get("Content-Range", "")
            start = ranged_offset(response.status_code, content_range, offset)
            yield Body(start, response.iter_bytes())

    def fault(self, error: Exception) -> AdapterFault:
        """An error of the hub's library or of its HTTP client."""
        return _fault(self._key, error)


def _check_token(api_token: str) -> None:
    if not (api_token.isascii() and api_token.isprintable() and " " not in api_token):
        raise AdapterForbidden("The API token holds characters that no token has.")


def _check_key(key: AdapterKey) -> None:
    """Raises AdapterNotFound for what cannot be on the hub, nor be a directory's name."""
    if len(key.id) > _MAX_ID_LENGTH or not _REPO_ID.fullmatch(key.id):
        raise AdapterNotFound(f"{shown(key.id)} is not the name of a hub repository.")
    if len(quote(key.revision, safe="")) > _MAX_REVISION_LENGTH:
        raise AdapterNotFound(f"{shown(key.id)} has no revision {shown(key.revision)}.")


def _files(key: AdapterKey, info: Any, allow_pickles: bool) -> list[RemoteFile]:
    """The files to download, config first."""
    present = {sibling.rfilename: sibling for sibling in info.siblings or []}
    names = adapter_files(present, allow_pickles, shown(str(key)))
    for name in names:
        size = present[name].size
        if type(size) is not int or size < 0:
            raise SourceUnavailable(f"The hub did not say how large {name} of {shown(key.id)} is.")
        check_size(name, size)
    check_config_size(present[CONFIG_FILE].size)
    return [RemoteFile(name, present[name].size, _checksum(present[name])) for name in names]


def _checksum(sibling: Any) -> Checksum | None:
    """A large file's sha256 or a small one's name in git; some mirrors say neither."""
    if sibling.lfs is not None:
        return Checksum("sha256", sibling.lfs.sha256.lower())
    return Checksum("git-sha1", sibling.blob_id.lower()) if sibling.blob_id else None


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
    return SourceUnavailable(
        f"The hub cannot be reached for {name}, or broke off ({type(error).__name__})."
    )
