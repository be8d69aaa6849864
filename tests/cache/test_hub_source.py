"""Adapters of a hub that speaks HTTP: what is downloaded, for whom, and every way it fails."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
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
from lorafleet.cache.sources.source import Patience
from lorafleet.proto.messages import AdapterKey, FetchProgress
from tests.cache.adapter_cases import (
    config_of,
    pickle_weights,
    split_weights,
    tensors_of,
    write_adapter,
)
from tests.cache.hub_stand_in import Hub, Repo

KEY = AdapterKey("hub", "owner/adapter")
FILES = ("adapter_config.json", "adapter_model.safetensors")
FETCH = """
import sys; from pathlib import Path
from lorafleet.cache.disk_tier import DiskTier
from lorafleet.cache.sources.hub import HubSource
from lorafleet.proto.messages import AdapterKey
source = HubSource(DiskTier(Path(sys.argv[1]), 1 << 20))
print(source.fetch(AdapterKey('hub', 'owner/adapter'), '', lambda progress: None))
"""


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


def test_downloads_every_file_of_sharded_weights(hub: Hub, disk: DiskTier, tmp_path: Path) -> None:
    folder = split_weights(tmp_path / "hub")
    directory = HubSource(disk, hub.endpoint).fetch(KEY, "", ignore)
    names = {path.name for path in folder.iterdir()} - {"README.md"}
    assert len(names) == 4
    for name in names:
        assert (directory / name).read_bytes() == (folder / name).read_bytes()
    assert not (directory / "README.md").exists()


def test_downloads_pickled_weights_only_if_allowed(
    hub: Hub, disk: DiskTier, tmp_path: Path
) -> None:
    pickle_weights(tmp_path / "hub")
    with pytest.raises(AdapterUnservable, match="--allow-pickled-adapters"):
        HubSource(disk, hub.endpoint).fetch(KEY, "", ignore)
    assert not leftovers(tmp_path)
    directory = HubSource(disk, hub.endpoint, allow_pickles=True).fetch(KEY, "", ignore)
    assert (directory / "adapter_model.bin").exists()


def leftovers(tmp_path: Path) -> list[str]:
    """Every file in the cache, locks of adapters included."""
    files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return [path.name for path in files if path.name != ".room"]


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


@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_download_that_breaks_off_goes_on_where_it_did(
    source: HubSource, hub: Hub, has_checksums: bool, tmp_path: Path
) -> None:
    repo = hub.repos["owner/adapter"]
    repo.has_checksums = has_checksums
    repo.cut_file, repo.cut_bytes, repo.num_cuts = FILES[1], 1000, 1
    directory = source.fetch(KEY, "", ignore)
    size = (tmp_path / "hub" / FILES[1]).stat().st_size
    assert hub.ranges == [f"bytes={size - 1000}-"]
    for name in FILES:
        assert (directory / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
    assert sorted(path.name for path in directory.iterdir()) == sorted([*FILES, "download.json"])


def test_without_ranges_it_begins_anew(source: HubSource, hub: Hub, tmp_path: Path) -> None:
    repo = hub.repos["owner/adapter"]
    repo.has_ranges, repo.cut_bytes, repo.num_cuts = False, 10, 1
    directory = source.fetch(KEY, "", ignore)
    for name in FILES:
        assert (directory / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()


def test_a_source_that_always_breaks_off_is_given_up_soon_and_gone_on_with_later(
    source: HubSource, hub: Hub
) -> None:
    hub.repos["owner/adapter"].cut_bytes = 10
    with pytest.raises(SourceUnavailable, match="'owner/adapter', or broke off"):
        source.fetch(KEY, "", ignore)
    assert hub.count("GET /owner/adapter/resolve") <= 5
    assert source.list() == []
    hub.repos["owner/adapter"].cut_bytes = 0
    hub.ranges.clear()
    source.fetch(KEY, "", ignore)
    assert len(hub.ranges) == 1


def test_a_new_commit_begins_anew(source: HubSource, hub: Hub, tmp_path: Path) -> None:
    repo = hub.repos["owner/adapter"]
    repo.cut_bytes = 10
    with pytest.raises(SourceUnavailable):
        source.fetch(KEY, "", ignore)
    write_adapter(tmp_path / "hub", tensors=tensors_of(seed=1))
    repo.cut_bytes = 0
    hub.ranges.clear()
    directory = source.fetch(KEY, "", ignore)
    assert hub.ranges == []
    assert (directory / FILES[1]).read_bytes() == (tmp_path / "hub" / FILES[1]).read_bytes()


def test_other_content_than_the_hub_says_is_never_served(
    source: HubSource, hub: Hub, tmp_path: Path
) -> None:
    hub.repos["owner/adapter"].is_corrupt = True
    with pytest.raises(SourceUnavailable, match=f"{FILES[0]} .* other content"):
        source.fetch(KEY, "", ignore)
    assert hub.count("GET /owner/adapter/resolve") == 1  # nothing tells that it would get better
    assert source.list() == []
    hub.repos["owner/adapter"].is_corrupt = False
    directory = source.fetch(KEY, "", ignore)
    assert (directory / FILES[0]).read_bytes() == (tmp_path / "hub" / FILES[0]).read_bytes()


def test_a_slow_hub_times_out(disk: DiskTier, hub: Hub) -> None:
    hub.repos["owner/adapter"].gate.clear()
    with pytest.raises(SourceTimeout, match="too long to answer"):
        HubSource(disk, hub.endpoint, Patience(answer_seconds=0.2)).fetch(KEY, "", ignore)


def test_a_hub_that_trickles_times_out(disk: DiskTier, hub: Hub) -> None:
    hub.repos["owner/adapter"].trickle_seconds = 0.02  # every byte an answer in time
    started = time.monotonic()
    with pytest.raises(SourceTimeout, match=r"did not arrive within 0\.3 seconds"):
        HubSource(disk, hub.endpoint, Patience(5.0, 0.3)).fetch(KEY, "", ignore)
    assert time.monotonic() - started < 3


def test_a_killed_download_is_never_served_and_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repos["owner/adapter"]
    repo.first_bytes = 2000  # the config whole, and the beginning of the weights
    repo.gate.clear()
    command = [sys.executable, "-P", "-c", FETCH, str(tmp_path / "cache")]
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        weights = tmp_path / "cache" / ".partial" / "hub" / "owner%2Fadapter@" / FILES[1]
        deadline = time.monotonic() + 30
        while not (weights.exists() and weights.stat().st_size == 2000):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    repo.gate.set()
    disk = DiskTier(tmp_path / "cache", 1 << 20)
    assert disk.list() == []
    hub.ranges.clear()
    directory = HubSource(disk, hub.endpoint).fetch(KEY, "", ignore)
    assert hub.ranges == ["bytes=2000-"]
    assert (directory / FILES[1]).read_bytes() == (tmp_path / "hub" / FILES[1]).read_bytes()


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
    disk.put(other, lambda directory: 3_000)
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


def test_a_directory_without_a_record_is_replaced(source: HubSource, disk: DiskTier) -> None:
    write_adapter(disk.path(KEY), config_of(8))
    (disk.path(KEY) / "download.json").write_text("{}")
    assert source.list() == []
    assert b'"r": 4' in (source.fetch(KEY, "", ignore) / FILES[0]).read_bytes()


def test_a_refresh_downloads_only_what_has_changed(
    source: HubSource, disk: DiskTier, hub: Hub, tmp_path: Path
) -> None:
    directory = source.fetch(KEY, "", ignore)
    hub.requests.clear()
    source.fetch(KEY, "", ignore, refresh=True)
    assert [line.split()[1] for line in hub.requests] == ["/api/models/owner/adapter"]
    before = (directory / FILES[1]).read_bytes()
    write_adapter(tmp_path / "hub", tensors=tensors_of(seed=1))
    hub.repos["owner/adapter"].cut_bytes = 10
    with pytest.raises(SourceUnavailable):
        source.fetch(KEY, "", ignore, refresh=True)
    assert (directory / FILES[1]).read_bytes() == before, "what there was is still served"
    hub.repos["owner/adapter"].cut_bytes = 0
    source.fetch(KEY, "", ignore, refresh=True)
    assert (directory / FILES[1]).read_bytes() == (tmp_path / "hub" / FILES[1]).read_bytes()
    hub.repos["owner/adapter"].token = "hf_right"
    source.fetch(KEY, "hf_right", ignore, refresh=True)
    assert disk.list("hub")[0].is_restricted
    with pytest.raises(AdapterNotFound):
        source.fetch(KEY, "", ignore)


def test_a_refresh_of_several_ranks_is_one_download(hub: Hub, tmp_path: Path) -> None:
    HubSource(DiskTier(tmp_path / "cache", 1 << 20), hub.endpoint).fetch(KEY, "", ignore)
    write_adapter(tmp_path / "hub", tensors=tensors_of(seed=1))
    hub.requests.clear()
    assert fetch_together(hub, tmp_path, refresh=True) == []
    assert hub.count("GET /owner/adapter/resolve") == len(FILES)


def test_callers_of_several_sources_share_one_download(hub: Hub, tmp_path: Path) -> None:
    assert fetch_together(hub, tmp_path) == []
    assert hub.count("GET /owner/adapter/resolve") == len(FILES)


def fetch_together(hub: Hub, tmp_path: Path, refresh: bool = False) -> list[AdapterFault]:
    """Several sources over one directory, as several ranks' processes have; what they raise."""
    barrier, faults = Barrier(4), list[AdapterFault]()

    def fetch() -> None:
        source = HubSource(DiskTier(tmp_path / "cache", 1 << 20), hub.endpoint)
        barrier.wait()
        try:
            source.fetch(KEY, "", ignore, refresh)
        except AdapterFault as fault:
            faults.append(fault)

    threads = [Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


def test_hf_endpoint_is_honoured(hub: Hub, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", FETCH, str(tmp_path / "cache")],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (Path(done.stdout.strip()) / FILES[1]).is_file()
    assert hub.count("resolve") == len(FILES)
