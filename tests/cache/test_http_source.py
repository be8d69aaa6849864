"""Archives from web servers: whose, how large, how broken, and how they are gone on with."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cache.disk_tier import DiskTier, Download
from lorafleet.cache.errors import (
    AdapterFault,
    AdapterForbidden,
    AdapterNotFound,
    AdapterUnservable,
    SourceTimeout,
    SourceUnavailable,
    TierFull,
)
from lorafleet.cache.sources.http import HttpSource
from lorafleet.cache.sources.http_url import AllowedHosts, ArchiveUrl
from lorafleet.cache.sources.source import Patience
from lorafleet.proto.messages import AdapterKey, FetchProgress
from tests.cache.archive_cases import REFUSED, adapter_files, tar_of, zip_of
from tests.cache.proxy import Proxy
from tests.cache.web_server import WebServer

MAX_BYTES = 1 << 20
FETCH = """
import sys; from pathlib import Path
from lorafleet.cache.disk_tier import DiskTier
from lorafleet.cache.sources.http import HttpSource
from lorafleet.proto.messages import AdapterKey
source = HttpSource(DiskTier(Path(sys.argv[1]), 1 << 22), [sys.argv[2]], 1 << 20)
source.fetch(AdapterKey('http', sys.argv[3]), '', lambda progress: None)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An adapter's files by name."""
    return adapter_files(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def server(tmp_path: Path, files: dict[str, bytes]) -> Iterator[WebServer]:
    root = tmp_path / "web"
    root.mkdir()
    (root / "a.tar.gz").write_bytes(tar_of(files))
    (root / "a.zip").write_bytes(zip_of({f"a/{name}": text for name, text in files.items()}))
    with WebServer(root) as server:
        yield server


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "cache", 1 << 22)


@pytest.fixture
def source(disk: DiskTier, server: WebServer) -> HttpSource:
    return HttpSource(disk, [server.host], MAX_BYTES)


def ignore(progress: FetchProgress) -> None:
    pass


def key(url: str) -> AdapterKey:
    return AdapterKey("http", url)


def fetch(source: HttpSource, url: str) -> dict[str, bytes]:
    """The adapter's files by name."""
    directory = source.fetch(key(url), "hf_token", ignore)
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    del found["download.json"]
    return found


@pytest.mark.parametrize("name", ["files/a.tar.gz", "files/a.zip", "plain/a.zip"])
def test_downloads_once(
    source: HttpSource, server: WebServer, files: dict[str, bytes], name: str
) -> None:
    url = f"{server.url}/{name}"
    assert fetch(source, url) == files
    num = len(server.requests)
    assert fetch(source, url) == files
    assert len(server.requests) == num
    assert source.disk_bytes(key(url)) == sum(map(len, files.values()))
    assert [found for found, _ in source.list()] == [key(url)]
    for request in server.requests:
        assert "Authorization" not in request.headers
        assert "Cookie" not in request.headers
    source.drop(key(url))
    assert source.list() == []


def test_a_netrc_file_is_not_sent(
    source: HttpSource, server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetch(source, f"{server.url}/files/a.zip")
    assert all("Authorization" not in request.headers for request in server.requests)


def test_the_hash_in_the_url_is_verified(
    source: HttpSource, server: WebServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    digest = hashlib.sha256((tmp_path / "web" / "a.zip").read_bytes()).hexdigest()
    assert fetch(source, f"{server.url}/files/a.zip#sha256={digest.upper()}") == files
    with pytest.raises(AdapterUnservable, match="another SHA-256"):
        fetch(source, f"{server.url}/files/a.tar.gz#sha256={digest}")
    assert list((tmp_path / "cache").rglob("archive")) == []


@pytest.mark.parametrize(
    "url",
    ["", "a.zip", "ftp://host/a.zip", "http://", "https:///a.zip", "http://ho st/a", "http://h\\@x/",
     "http://host/ä.zip", "http://host:99999/a", "http://host:x/a", "http://host/a.zip#sha256=12",
     "http://host/a.zip#main", "file:///etc/passwd", "http://host/a\n.zip"],
)  # fmt: skip
def test_what_is_no_url_is_not_found(source: HttpSource, server: WebServer, url: str) -> None:
    with pytest.raises(AdapterNotFound):
        fetch(source, url)
    assert server.requests == []


@pytest.mark.parametrize("rest", ["me:s3cret@{host}/files/a.zip", "{host}/files/a.zip?key=s3cret"])
def test_secrets_in_a_url_are_refused_and_not_repeated(
    source: HttpSource, server: WebServer, rest: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(AdapterUnservable, match="no user, password or query") as caught:
        fetch(source, "http://" + rest.format(host=server.host))
    assert "s3cret" not in "".join(traceback.format_exception(caught.value)) + caplog.text
    assert server.requests == []


def test_without_hosts_everything_is_forbidden(disk: DiskTier, server: WebServer) -> None:
    with pytest.raises(AdapterForbidden, match="allows no host"):
        fetch(HttpSource(disk, [], MAX_BYTES), f"{server.url}/files/a.zip")
    assert server.requests == []


@pytest.mark.parametrize(
    ("allowed", "url", "is_allowed"),
    [
        ("example.com", "https://example.com/a", True),
        ("example.com", "http://EXAMPLE.com:80/a", True),
        ("example.com", "http://example.com:8080/a", False),
        ("example.com:8080", "http://example.com:8080/a", True),
        ("example.com:8080", "https://example.com/a", False),
        ("example.com", "https://example.com.evil.org/a", False),
        ("example.com", "https://sub.example.com/a", False),
        ("[::1]:8080", "http://[::1]:8080/a", True),
        ("127.0.0.1", "http://127.1/a", False),
    ],
)
def test_hosts_are_exact(allowed: str, url: str, is_allowed: bool) -> None:
    expected: AbstractContextManager[Any] = (
        nullcontext() if is_allowed else pytest.raises(AdapterForbidden, match="not allow")
    )
    with expected:
        AllowedHosts([allowed]).check(ArchiveUrl.parse(key(url)))


@pytest.mark.parametrize("host", ["", "http://host", "host/path", "user@host", "host:x", "host?"])
def test_a_bad_host_is_named(disk: DiskTier, host: str) -> None:
    with pytest.raises(ValueError, match="--adapter-http-hosts must be hosts"):
        HttpSource(disk, [host], MAX_BYTES)


def test_redirects_stay_with_allowed_hosts(
    disk: DiskTier, source: HttpSource, server: WebServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    with WebServer(tmp_path / "elsewhere") as other:
        (tmp_path / "elsewhere" / "a.zip").write_bytes(zip_of(files))
        url = f"{server.url}/redirect/a.zip"
        server.redirects["a.zip"] = f"{other.url}/files/a.zip?signature=s3cret"
        with pytest.raises(AdapterForbidden, match=f"redirected elsewhere.*{other.host}") as caught:
            fetch(source, url)
        assert "s3cret" not in str(caught.value)
        assert other.requests == []
        assert fetch(HttpSource(disk, [server.host, other.host], MAX_BYTES), url) == files
    server.redirects["b.zip"] = "../files/a.tar.gz"
    assert fetch(source, f"{server.url}/redirect/b.zip") == files
    server.redirects["c.zip"] = "/redirect/c.zip"
    with pytest.raises(SourceUnavailable, match="more than 5 times"):
        fetch(source, f"{server.url}/redirect/c.zip")
    server.redirects["d.zip"] = "file:///etc/passwd"
    with pytest.raises(AdapterForbidden, match="no HTTPS URL"):
        fetch(source, f"{server.url}/redirect/d.zip")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AdapterForbidden),
        (403, AdapterForbidden),
        (404, AdapterNotFound),
        (410, AdapterNotFound),
        (418, SourceUnavailable),
        (429, SourceUnavailable),
        (500, SourceUnavailable),
        (204, SourceUnavailable),
    ],
)
def test_what_a_server_refuses(
    source: HttpSource, server: WebServer, status: int, kind: type[AdapterFault]
) -> None:
    with pytest.raises(kind):
        fetch(source, f"{server.url}/status/{status}")
    assert len(server.requests) == 1


def test_sizes_are_known_and_limited_before_anything_is_downloaded(
    disk: DiskTier, server: WebServer, tmp_path: Path
) -> None:
    size = (tmp_path / "web" / "a.zip").stat().st_size
    source = HttpSource(disk, [server.host], size - 1)
    with pytest.raises(AdapterUnservable, match=f"has {size} bytes; --adapter-archive-bytes"):
        fetch(source, f"{server.url}/files/a.zip")
    with pytest.raises(AdapterUnservable, match="does not say how large"):
        fetch(source, f"{server.url}/chunked/a.zip")
    assert server.paths() == ["/files/a.zip", "/chunked/a.zip"]


@pytest.mark.parametrize("name", ["tar: symbolic link", "zip: parent", "tar: absurd ratio"])
def test_a_bad_archive_is_unservable_and_leaves_nothing(
    source: HttpSource, server: WebServer, files: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    make, words = REFUSED[name]
    (tmp_path / "web" / "bad").write_bytes(make(files))
    with pytest.raises(AdapterUnservable, match=words):
        fetch(source, f"{server.url}/files/bad")
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == [".room"]


def test_a_full_disk_keeps_the_archive_for_the_next_try(
    server: WebServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    size = (tmp_path / "web" / "a.zip").stat().st_size + sum(map(len, files.values()))
    disk = DiskTier(tmp_path / "small", size + 100)
    other = Download(AdapterKey("hub", "someone/other"), "c0ffee", 200, False)
    with disk.lock(other.key):
        disk.put(other, lambda directory: 200)
    source = HttpSource(disk, [server.host], MAX_BYTES)
    with pytest.raises(TierFull, match=f"needs {size} bytes"):
        fetch(source, f"{server.url}/files/a.zip")
    disk.drop(other.key)
    num = len(server.requests)
    assert fetch(source, f"{server.url}/files/a.zip") == files
    assert len(server.requests) == num + 1  # it only looked


def test_a_broken_connection_is_gone_on_with(
    disk: DiskTier, server: WebServer, files: dict[str, bytes]
) -> None:
    with Proxy(server.url) as proxy:
        proxy.cut_after = 2_000
        source = HttpSource(disk, [proxy.host], MAX_BYTES)
        assert fetch(source, f"{proxy.url}/files/a.zip") == files
        assert proxy.num_cuts == 1
    ranges = [request.headers.get("Range", "") for request in server.requests]
    assert ranges[:2] == ["bytes=0-0", ""]
    begin = int(ranges[2].removeprefix("bytes=").removesuffix("-"))
    assert 1_000 < begin < 2_000  # what was cut has a header, too
    assert server.requests[2].headers["If-Range"].startswith('"')


def test_a_broken_connection_without_ranges_begins_anew(
    disk: DiskTier, server: WebServer, files: dict[str, bytes]
) -> None:
    with Proxy(server.url) as proxy:
        proxy.cut_after = 2_000
        source = HttpSource(disk, [proxy.host], MAX_BYTES)
        assert fetch(source, f"{proxy.url}/plain/a.zip") == files
        assert proxy.num_cuts == 1
    assert [request.headers.get("Range") for request in server.requests[1:]] == [None, None]


def test_an_archive_that_changes_on_the_way_is_not_mixed(
    disk: DiskTier, server: WebServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    with Proxy(server.url) as proxy:
        proxy.cut_after = 2_000
        proxy.on_cut = lambda: (tmp_path / "web" / "a.zip").write_bytes(zip_of(files))
        os.utime(tmp_path / "web" / "a.zip", (1, 1))
        source = HttpSource(disk, [proxy.host], MAX_BYTES)
        with pytest.raises(SourceUnavailable, match="changed while it was downloaded"):
            fetch(source, f"{proxy.url}/files/a.zip")
        assert fetch(source, f"{proxy.url}/files/a.zip") == files


def test_a_server_that_trickles_times_out(disk: DiskTier, server: WebServer) -> None:
    source = HttpSource(disk, [server.host], MAX_BYTES, Patience(5.0, 0.3))
    started = time.monotonic()
    with pytest.raises(SourceTimeout, match=r"within 0\.3 seconds"):
        fetch(source, f"{server.url}/trickle/a.zip")
    assert time.monotonic() - started < 3


def test_a_killed_download_is_never_served_and_gone_on_with(
    server: WebServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    with Proxy(server.url) as proxy:
        proxy.stall_after = 2_000
        url = f"{proxy.url}/files/a.zip"
        command = [sys.executable, "-P", "-c", FETCH, str(tmp_path / "cache"), proxy.host, url]
        with subprocess.Popen(command) as process:
            deadline = time.monotonic() + 30
            while not [p for p in (tmp_path / "cache").rglob("archive") if p.stat().st_size > 1000]:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.kill()
        proxy.stall_after = 0
        again = DiskTier(tmp_path / "cache", 1 << 22)
        assert again.list() == []
        num = len(server.requests)
        assert fetch(HttpSource(again, [proxy.host], MAX_BYTES), url) == files
        ranges = [request.headers.get("Range", "") for request in server.requests[num:]]
        assert ranges[0] == "bytes=0-0"
        assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) > 1000
