"""Adapters of a hub that speaks HTTP: what is downloaded, for whom, and every way it fails."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread

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
from lorafleet.cache.sources.hub import HubSource
from lorafleet.proto.messages import AdapterKey, FetchProgress
from tests.cache.adapter_cases import config_of, write_adapter
from tests.cache.hub_stand_in import Hub, Repo

KEY = AdapterKey("hub", "owner/adapter")
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub().serve() as hub:
        hub.repos["owner/adapter"] = Repo(write_adapter(tmp_path / "hub"))
        (tmp_path / "hub" / "README.md").write_text("not needed")
        yield hub


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "cache", 1 << 20)


@pytest.fixture
def source(hub: Hub, disk: DiskTier) -> HubSource:
    return HubSource(disk, hub.endpoint)


def ignore(progress: FetchProgress) -> None:
    pass


def leftovers(tmp_path: Path) -> list[str]:
    """What is in the cache besides locks."""
    return [path.name for path in (tmp_path / "cache").iterdir() if path.name != ".locks"]


def test_downloads_the_adapters_files_once(source: HubSource, hub: Hub, tmp_path: Path) -> None:
    seen: list[FetchProgress] = []
    directory = source.fetch(KEY, "", seen.append)
    size = 0
    for name in FILES:
        content = (tmp_path / "hub" / name).read_bytes()
        assert (directory / name).read_bytes() == content
        size += len(content)
    assert not (directory / "README.md").exists()
    assert source.disk_bytes(KEY) == size
    assert {progress.stage for progress in seen} == {"downloading"}
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (size, size)
    before = len(hub.requests)
    assert source.fetch(KEY, "", seen.append) == directory
    assert len(hub.requests) == before
    assert hub.tokens == []


def test_revisions_are_apart(source: HubSource, hub: Hub) -> None:
    hub.repos["owner/adapter"].branches = ("main", "refs/pr/1", "v1")
    commit = hub.repos["owner/adapter"].commit
    revisions = ("", "main", "refs/pr/1", "v1", commit)
    found = {source.fetch(AdapterKey("hub", KEY.id, name), "", ignore) for name in revisions}
    assert len(found) == len(revisions)
    with pytest.raises(AdapterNotFound):
        source.fetch(AdapterKey("hub", KEY.id, "v2"), "", ignore)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("owner/nothing", ""),
        ("nothing", ""),
        ("", ""),
        ("..", ""),
        ("../../etc", ""),
        ("a/b/c", ""),
        ("owner/adapter\n", ""),
        ("owner/" + "x" * 500, ""),
        ("owner/adapter", "v2"),
        ("owner/adapter", "../.."),
        ("owner/adapter", "x" * 500),
        ("owner/adapter", "\0"),
    ],
)
def test_what_is_not_there_is_not_found(
    source: HubSource, tmp_path: Path, name: str, revision: str
) -> None:
    with pytest.raises(AdapterNotFound):
        source.fetch(AdapterKey("hub", name, revision), "", ignore)
    assert leftovers(tmp_path) == []


def test_a_private_repository_needs_its_token_every_time(source: HubSource, hub: Hub) -> None:
    hub.repos["owner/adapter"].token = "hf_right"
    for token in ("", "hf_wrong"):
        with pytest.raises(AdapterNotFound):
            source.fetch(KEY, token, ignore)
    source.fetch(KEY, "hf_right", ignore)
    source.fetch(KEY, "hf_right", ignore)
    source.authorize(KEY, "hf_right")
    assert hub.count("GET /owner/adapter/resolve") == 2
    for token in ("", "hf_wrong"):
        with pytest.raises(AdapterNotFound):
            source.fetch(KEY, token, ignore)
        with pytest.raises(AdapterNotFound):
            source.authorize(KEY, token)
    assert source.list() == []


def test_a_gated_repository_is_forbidden_without_its_token(source: HubSource, hub: Hub) -> None:
    hub.repos["owner/adapter"].token = "hf_right"
    hub.repos["owner/adapter"].is_gated = True
    for token in ("", "hf_wrong"):
        with pytest.raises(AdapterForbidden):
            source.fetch(KEY, token, ignore)
    source.fetch(KEY, "hf_right", ignore)
    with pytest.raises(AdapterForbidden):
        source.authorize(KEY, "hf_wrong")
    assert source.list() == []


def test_the_machines_own_token_is_never_sent(
    source: HubSource, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_machine")
    source.fetch(KEY, "", ignore)
    source.authorize(KEY, "")
    assert hub.tokens == []


@pytest.mark.parametrize("token", ["invalid", "line\nbreak", "a b", "schlüssel", "\0"])
def test_a_token_that_is_none_is_forbidden_and_never_shown(
    source: HubSource, hub: Hub, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(AdapterForbidden) as caught:
        source.fetch(KEY, token, ignore)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert token not in shown.replace("Invalid", "").replace("test_", "")


@pytest.mark.parametrize("status", [500, 502, 503, 429, 418])
def test_a_hub_in_trouble_is_unavailable(
    source: HubSource, hub: Hub, tmp_path: Path, status: int
) -> None:
    hub.repos["owner/adapter"].status = status
    with pytest.raises(SourceUnavailable, match=str(status)):
        source.fetch(KEY, "hf_secret", ignore)
    assert leftovers(tmp_path) == []


def test_a_403_is_forbidden(source: HubSource, hub: Hub) -> None:
    hub.repos["owner/adapter"].status = 403
    with pytest.raises(AdapterForbidden):
        source.fetch(KEY, "", ignore)


def test_no_hub_is_unavailable(disk: DiskTier) -> None:
    with socket.socket() as listener:  # bound, so that the port stays free of servers
        listener.bind(("127.0.0.1", 0))
        source = HubSource(disk, f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(SourceUnavailable, match="cannot be reached"):
            source.fetch(KEY, "hf_secret", ignore)


def test_a_download_that_breaks_off_leaves_nothing(
    source: HubSource, hub: Hub, tmp_path: Path
) -> None:
    hub.repos["owner/adapter"].cut_bytes = 10
    with pytest.raises(SourceUnavailable):
        source.fetch(KEY, "", ignore)
    assert leftovers(tmp_path) == []
    hub.repos["owner/adapter"].cut_bytes = 0
    source.fetch(KEY, "", ignore)


def test_a_slow_hub_times_out(disk: DiskTier, hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/adapter"].gate.clear()
    with pytest.raises(SourceTimeout):
        HubSource(disk, hub.endpoint, timeout_seconds=0.2).fetch(KEY, "", ignore)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", FILES)
def test_a_repository_without_an_adapter_is_unservable(
    source: HubSource, hub: Hub, tmp_path: Path, name: str
) -> None:
    (tmp_path / "hub" / name).unlink()
    with pytest.raises(AdapterUnservable, match=f"no {name}"):
        source.fetch(KEY, "", ignore)
    assert hub.count("resolve") == 0


def test_a_full_disk_tier_refuses_before_it_downloads(hub: Hub, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "cache", 4_000)
    other = Download(AdapterKey("hub", "someone/other"), "c0ffee", 3_000, False)
    disk.put(other, lambda directory: None)
    with pytest.raises(TierFull, match="1000 of 4000 are free"):
        HubSource(disk, hub.endpoint).fetch(KEY, "", ignore)
    assert hub.count("resolve") == 0


def test_a_download_that_can_never_fit_is_unservable(hub: Hub, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "cache", 100)
    with pytest.raises(AdapterUnservable, match="all downloads together may have 100"):
        HubSource(disk, hub.endpoint).fetch(KEY, "", ignore)
    assert hub.count("resolve") == 0


def test_dropping_frees_the_disk(source: HubSource, disk: DiskTier, tmp_path: Path) -> None:
    source.fetch(KEY, "", ignore)
    assert [key for key, _ in source.list()] == [KEY]
    source.drop(KEY)
    source.drop(KEY)
    assert leftovers(tmp_path) == []
    assert disk.list() == []
    with pytest.raises(AdapterNotFound):
        source.authorize(KEY, "")


def test_what_a_dead_process_left_is_replaced(source: HubSource, disk: DiskTier) -> None:
    directory = disk.path(KEY)
    aside = directory.with_name(f".{directory.name}")
    for leftover in (directory, aside):
        write_adapter(leftover, config_of(8))
        (leftover / "download.json").write_text("{}")
    assert source.list() == []
    assert b'"r": 4' in (source.fetch(KEY, "", ignore) / FILES[0]).read_bytes()
    assert not aside.exists()


def test_callers_of_several_sources_share_one_download(hub: Hub, tmp_path: Path) -> None:
    """Several sources over one directory, as several ranks' processes have."""
    barrier, faults = Barrier(4), list[AdapterFault]()

    def fetch() -> None:
        source = HubSource(DiskTier(tmp_path / "cache", 1 << 20), hub.endpoint)
        barrier.wait()
        try:
            source.fetch(KEY, "", ignore)
        except AdapterFault as fault:
            faults.append(fault)

    threads = [Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert hub.count("GET /owner/adapter/resolve") == len(FILES)


def test_hf_endpoint_is_honoured(hub: Hub, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from lorafleet.cache.disk_tier import DiskTier\n"
        "from lorafleet.cache.sources.hub import HubSource\n"
        "from lorafleet.proto.messages import AdapterKey\n"
        "source = HubSource(DiskTier(Path(sys.argv[1]), 1 << 20), None)\n"
        "print(source.fetch(AdapterKey('hub', 'owner/adapter'), '', lambda progress: None))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(tmp_path / "cache")],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (Path(done.stdout.strip()) / FILES[1]).is_file()
    assert hub.count("resolve") == len(FILES)
