"""S3Source: adapters in S3, or in anything that speaks its protocol.

Credentials are the server's own, found the way boto3 finds them, and never in a message; so every
caller may use what they open. boto3 is an extra of the package and is imported on first use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

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
from lorafleet.cache.tokenizer_files import MAX_TOKENIZER_BYTES, check_size
from lorafleet.cache.weight_files import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    PICKLE_FILES,
    WEIGHTS_FILE,
    adapter_files,
    check_number_of_parts,
    parse_index,
)
from lorafleet.proto.messages import AdapterKey

SOURCE = "s3"

_ID = re.compile(r"(?:s3://)?([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.*[^/])/*", re.ASCII)
_CHUNK_BYTES = 16 << 10  # a chunk waits until it is full, so small ones see the deadline in time
_MD5 = re.compile(r"[0-9a-f]{32}")
_DIRECTORY_BUCKET = "--x-s3"  # how their names end; their ETags are not MD5
_MAX_CONNECTIONS = 1024  # kept open at most; more than this many downloads reconnect
_ATTEMPTS = 2  # of boto3 for one answer; Transfer has its own for files


class S3Source(Downloads):
    """`id` is `s3://bucket/prefix`: the adapter's files are the objects `prefix/<file>`.

    The ETag, or the version in a bucket that has versions, is the commit. There are no revisions
    to ask for: files have versions of their own, adapters do not.
    """

    def __init__(
        self,
        disk: DiskTier,
        endpoint: str = "",
        buckets: Iterable[str] = (),
        patience: Patience | None = None,
        allow_pickles: bool = False,
    ) -> None:
        """`endpoint`: base URL, empty for boto3's own; `buckets`: the only ones, empty for any."""
        super().__init__(disk, SOURCE)
        self._endpoint, self._buckets = endpoint, frozenset(buckets)
        self._patience, self._allow_pickles = patience or Patience(), allow_pickles
        self._client: Any = None  # made on first use, safe to share between threads
        self._lock = Lock()  # guards _client; making one is not thread-safe

    def fetch(
        self, key: AdapterKey, api_token: str, progress: Progress, refresh: bool = False
    ) -> Path:
        """Downloads unless the files are here already; see AdapterFault for what it raises."""
        bucket, prefix = _parse(key)
        if self._buckets and bucket not in self._buckets:
            raise AdapterForbidden(f"Adapters from the bucket {shown(bucket)} are not served here.")
        self._disk.get_or_put(key, lambda: self._plan(key, bucket, prefix, progress), refresh)
        return self._disk.path(key)

    def authorize(self, key: AdapterKey, api_token: str) -> None:
        """Everyone may use what this server's credentials open."""

    def _plan(
        self, key: AdapterKey, bucket: str, prefix: str, progress: Progress
    ) -> tuple[Download, Fill]:
        folder = _Folder(key, self._connected(), bucket, prefix)
        files = folder.files(self._allow_pickles)
        download = Download(key, folder.commit, sum(file.nbytes for file in files), False)
        transfer = Transfer(folder, self._patience, progress)
        return download, lambda directory: transfer.run(directory, files)

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _client(self._endpoint, self._patience.answer_seconds)
            return self._client


class _Folder:
    """One adapter's objects, pinned to what they were when they were first looked at."""

    def __init__(self, key: AdapterKey, client: Any, bucket: str, prefix: str) -> None:
        self.name = shown(key.id)
        self._client, self._bucket, self._prefix = client, bucket, prefix
        self._pins: dict[str, dict[str, str]] = {}  # file -> what makes S3 give this content only

    @property
    def commit(self) -> str:
        """Names the content of all files; known after `files`."""
        return " ".join(pin.get("VersionId") or pin["IfMatch"] for pin in self._pins.values())

    def files(self, allow_pickles: bool) -> list[RemoteFile]:
        """The files to download, config first. Raises AdapterFault."""
        heads = self._heads(CONFIG_FILE, WEIGHTS_FILE)
        if WEIGHTS_FILE not in heads:
            heads |= self._heads(INDEX_FILE)
            if INDEX_FILE in heads:
                parts = sorted(set(self._index().values()))
                check_number_of_parts(len(parts), self.name)
                heads |= self._heads(*parts)
            else:
                heads |= self._heads(*PICKLE_FILES)
            if not heads:
                raise AdapterNotFound(f"S3 has no {self.name}.")
        optional = ((name, self._optional_head(name)) for name in MAX_TOKENIZER_BYTES)
        heads |= {name: head for name, head in optional if head is not None}
        names = adapter_files(heads, allow_pickles, self.name)
        check_config_size(heads[CONFIG_FILE]["ContentLength"])
        return [self._file(name, heads[name]) for name in names]

    def _heads(self, *names: str) -> dict[str, Any]:
        """What S3 says of those of the objects that are there."""
        heads = ((name, self._head(name)) for name in names)
        return {name: head for name, head in heads if head is not None}

    def _index(self) -> dict[str, str]:
        try:
            with closing(self._client.get_object(**self._object(INDEX_FILE))["Body"]) as body:
                data = body.read(MAX_INDEX_BYTES + 1)
        except Exception as error:
            raise self.fault(error) from None
        return parse_index(data)

    @contextmanager
    def open(self, file: RemoteFile, offset: int) -> Iterator[Body]:
        """Streams one object."""
        asked = {"Range": f"bytes={offset}-"} if offset else {}
        answer = self._client.get_object(
            **self._object(file.name), **self._pins[file.name], **asked
        )
        with closing(answer["Body"]) as body:
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            start = ranged_offset(status, answer.get("ContentRange", ""), offset)
            yield Body(start, body.iter_chunks(_CHUNK_BYTES))

    def fault(self, error: Exception) -> AdapterFault:
        """An error of boto3, whose own message may hold more than the client should read."""
        from botocore.exceptions import (
            ClientError,
            ConnectTimeoutError,
            NoCredentialsError,
            ParamValidationError,
            PartialCredentialsError,
            ReadTimeoutError,
        )

        if isinstance(error, ClientError):
            return self._refusal(error.response)
        if isinstance(error, ParamValidationError):
            return AdapterNotFound(f"S3 has no {self.name}.")
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return SourceUnavailable(f"This server has no credentials to read {self.name} from S3.")
        if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
            return SourceTimeout(f"S3 took too long to answer for {self.name}.")
        return SourceUnavailable(
            f"S3 cannot be reached for {self.name}, or broke off ({type(error).__name__})."
        )

    def _refusal(self, response: Any) -> AdapterFault:
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status in (401, 403):
            return AdapterForbidden(
                f"S3 does not let this server read {self.name}, or has none and does not say so."
            )
        if status == 404:
            return AdapterNotFound(f"S3 has no {self.name}.")
        if status == 412:
            return SourceUnavailable(f"{self.name} changed while it was downloaded.")
        return SourceUnavailable(f"S3 answered {status} for {self.name}; try again later.")

    def _head(self, name: str) -> Any:
        """What S3 says of an object, or None when there is none."""
        try:
            return self._client.head_object(**self._object(name))
        except Exception as error:
            fault = self.fault(error)
            if isinstance(fault, AdapterNotFound):
                return None
            raise fault from None

    def _optional_head(self, name: str) -> Any:
        """As `_head`; to a server that may not list a bucket S3 says 403 of what is not there."""
        try:
            return self._head(name)
        except AdapterForbidden:
            return None

    def _file(self, name: str, head: Any) -> RemoteFile:
        check_size(name, head["ContentLength"])
        self._pins[name] = {"IfMatch": head["ETag"]}
        if head.get("VersionId", "null") != "null":
            self._pins[name]["VersionId"] = head["VersionId"]
        return RemoteFile(name, head["ContentLength"], self._checksum(head))

    def _checksum(self, head: Any) -> Checksum | None:
        """The MD5 that an ETag is, except of objects uploaded in parts or encrypted with a key."""
        etag = head["ETag"].strip('"')
        is_plain = head.get("ServerSideEncryption", "AES256") == "AES256"
        is_plain = is_plain and "SSECustomerAlgorithm" not in head
        if is_plain and _MD5.fullmatch(etag) and not self._bucket.endswith(_DIRECTORY_BUCKET):
            return Checksum("md5", etag)
        return None

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._prefix}/{name}"}


def _parse(key: AdapterKey) -> tuple[str, str]:
    """Bucket and prefix, which has no slash at its end. Raises AdapterNotFound."""
    match = _ID.fullmatch(key.id)
    if match is None or not key.id.isprintable():
        raise AdapterNotFound(
            f"{shown(key.id)} is not an adapter of S3 such as s3://bucket/prefix."
        )
    if key.revision:
        raise AdapterNotFound(
            f"{shown(key.id)} has no revision {shown(key.revision)}: adapters from S3 have none."
        )
    return match[1], match[2]


def _client(endpoint: str, answer_seconds: float) -> Any:
    """A client of boto3. Raises AdapterFault without boto3 or with settings it cannot use."""
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise AdapterNotFound(
            "Adapters from S3 are not served here: boto3 is not installed (lorafleet[s3])."
        ) from None
    custom = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=answer_seconds,
        read_timeout=answer_seconds,
        retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
        max_pool_connections=_MAX_CONNECTIONS,
        # Servers other than Amazon's rarely have a name in the DNS for every bucket.
        s3={"addressing_style": "path"} if custom else None,
    )
    try:
        session = boto3.session.Session()
        # Amazon's own servers need a region only to be found; which one, they tell by themselves.
        region = session.region_name or "us-east-1"
        return session.client("s3", region, endpoint_url=endpoint or None, config=config)
    except (BotoCoreError, ValueError) as error:
        raise SourceUnavailable(
            f"S3 cannot be used with this server's settings ({type(error).__name__})."
        ) from None
