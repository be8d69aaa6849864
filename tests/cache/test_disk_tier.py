"""Downloads that take the place of others: what is planned again, what stays, what is counted."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from filelock import FileLock, Timeout

from lorafleet.cache.disk_tier import DiskTier, Download, Fill
from lorafleet.cache.errors import SourceUnavailable, TierFull
from lorafleet.proto.messages import AdapterKey

KEY, OTHER = AdapterKey("hub", "owner/adapter"), AdapterKey("hub", "owner/other")
ASKED = AdapterKey("hub", "owner/asked")


def plan(
    commit: str, nbytes: int = 10, key: AdapterKey = KEY
) -> Callable[[], tuple[Download, Fill]]:
    """Files that say which commit they are of."""

    def fill(directory: Path) -> int:
        (directory / "weights").write_text(commit.ljust(nbytes))
        return nbytes

    return lambda: (Download(key, commit, nbytes, is_restricted=False), fill)


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "cache", 100)


def content(tier: DiskTier) -> str:
    return (tier.path(KEY) / "weights").read_text().strip()


def test_only_a_refresh_plans_again(tier: DiskTier) -> None:
    assert tier.get_or_put(KEY, plan("1"))[1]
    assert tier.get_or_put(KEY, plan("2")) == (tier.get(KEY), False)
    assert content(tier) == "1"
    assert tier.get_or_put(KEY, plan("2"), refresh=True) == (tier.get(KEY), True)
    assert content(tier) == "2"


def test_a_refresh_that_breaks_off_leaves_what_there_was(tier: DiskTier) -> None:
    tier.get_or_put(KEY, plan("1"))

    def broken() -> tuple[Download, Fill]:
        def fill(directory: Path) -> int:
            raise SourceUnavailable("gone")

        return Download(KEY, "2", 10, is_restricted=False), fill

    with pytest.raises(SourceUnavailable):
        tier.get_or_put(KEY, broken, refresh=True)
    assert content(tier) == "1"


def test_a_refresh_that_was_asked_for_after_a_plan_is_not_answered_by_it(tier: DiskTier) -> None:
    planned, go, found = Event(), Event(), list[str]()

    def slow() -> tuple[Download, Fill]:
        found = plan("2")()
        planned.set()
        assert go.wait(60)
        return found

    def again() -> None:
        tier.get_or_put(KEY, plan("3"), refresh=True)
        found.append(content(tier))

    threads = [Thread(target=lambda: tier.get_or_put(KEY, slow, refresh=True))]
    threads[0].start()
    assert planned.wait(60)
    time.sleep(0.01)  # a clock's tick
    threads.append(Thread(target=again))
    threads[1].start()
    time.sleep(0.1)  # it waits for the other
    go.set()
    for thread in threads:
        thread.join()
    assert found == ["3"]


def test_a_download_that_fits_alone_takes_the_place_of_an_older_one(tier: DiskTier) -> None:
    tier.get_or_put(KEY, plan("1", 60))
    tier.get_or_put(OTHER, plan("1", 30, OTHER))
    tier.get_or_put(KEY, plan("2", 60), refresh=True)
    assert content(tier) == "2"
    assert tier.get(OTHER) is not None


def test_a_kill_at_any_point_of_a_replacement_leaves_one_or_none(tmp_path: Path) -> None:
    calls = 0
    while not replaced(tmp_path / str(calls), calls):
        tier = DiskTier(tmp_path / str(calls), 100)  # the next start
        if tier.get(KEY) is not None:
            assert content(tier) in ("1", "2")
        tier.get_or_put(KEY, plan("3"), refresh=True)
        assert content(tier) == "3"
        assert list((tmp_path / str(calls) / ".partial").glob("*/*")) == []
        calls += 1
    assert calls > 4  # steps that were looked at


def replaced(root: Path, calls: int) -> bool:
    """Has a process replace a download, killed at one of its calls; whether it had fewer."""
    DiskTier(root, 100).get_or_put(KEY, plan("1"))
    child = os.fork()
    if child == 0:
        left = calls

        def counted(call: Callable[..., Any]) -> Any:
            def wrapped(*args: Any, **options: Any) -> Any:
                nonlocal left
                if not left:
                    os._exit(1)
                left -= 1
                return call(*args, **options)

            return wrapped

        for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "unlink"), (shutil, "rmtree")):
            setattr(owner, name, counted(getattr(owner, name)))
        DiskTier(root, 100).get_or_put(KEY, plan("2"), refresh=True)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("act", ["download", "replace", "drop"])
def test_whoever_may_count_counts_every_byte(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """Before and after each step that changes the disk, nobody is promised room that is taken."""
    tier.get_or_put(OTHER, plan("1", 10, OTHER))
    if act != "download":
        tier.get_or_put(KEY, plan("1"))
    beside = Beside(tier.path(KEY).parent.parent)
    for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "fsync"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, beside.asking(getattr(owner, name)))
    if act == "drop":
        tier.drop(KEY)
    else:
        tier.get_or_put(KEY, plan("2"), refresh=True)
    assert beside.num_refused


class Beside:
    """A process that wants one byte more of a tier of 100 bytes than are free."""

    def __init__(self, root: Path) -> None:
        self._root, self._is_asking, self.num_refused = root, False, 0

    def asking(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, between two tries to get room."""

        def between(*args: Any, **options: Any) -> Any:
            self._ask()
            result = call(*args, **options)
            self._ask()
            return result

        return between

    def _ask(self) -> None:
        if self._is_asking:  # the tier that asks takes the same steps
            return
        self._is_asking = True
        if not self._is_locked():
            taken = sum(path.stat().st_size for path in self._root.rglob("weights"))
            wanted = Download(ASKED, "1", 101 - taken, is_restricted=False)
            tier = DiskTier(self._root, 100)
            with pytest.raises(TierFull):
                tier.reserve(wanted)
            self.num_refused += 1
        self._is_asking = False

    def _is_locked(self) -> bool:
        try:
            with FileLock(self._root / ".room", timeout=0):
                return False
        except Timeout:
            return True


def test_a_record_that_is_written_again_is_always_there(tier: DiskTier, tmp_path: Path) -> None:
    """Other ranks' processes read records without a lock."""
    tier.get_or_put(KEY, plan("1"))
    over, missed = Event(), list[int]()

    def read() -> None:
        other = DiskTier(tmp_path / "cache", 100)
        while not over.is_set():
            if other.get(KEY) is None:
                missed.append(1)

    reading = Thread(target=read)
    reading.start()
    for _ in range(100):
        tier.get_or_put(KEY, plan("1"), refresh=True)
    over.set()
    reading.join()
    assert missed == []
