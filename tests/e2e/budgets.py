"""Budgets, watched while a service runs: by the router, by the shards, and on the disk itself."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc
import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.proto import shard_pb2
from lorafleet.proto.codec import decode
from lorafleet.proto.messages import AdapterInfo, Tier
from tests.e2e.service import Service


@dataclass
class Budgets:
    """What may be held at most, and every time that it was more. Sizes in bytes."""

    slots: int
    device: int
    host: int
    disk: int
    cache: Path
    num_looks: Counter[str] = field(default_factory=Counter)
    most: dict[str, int] = field(default_factory=dict)
    exceeded: list[str] = field(default_factory=list)

    @contextmanager
    def watched(self, service: Service, pause_seconds: float = 0.05) -> Iterator[None]:
        """Looks from a thread until the block ends; AssertionError if a budget was exceeded."""
        over = Event()
        shards = [grpc.insecure_channel(address) for address in shard_addresses(service)]

        def look(how: Callable[[], None]) -> None:
            while not over.wait(pause_seconds):
                how()

        looks = (
            lambda: self._look_at_sums(service),
            lambda: self._look_at_adapters(service),
            lambda: self._look_at_shards(shards),
        )
        threads = [Thread(target=look, args=(how,)) for how in looks]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()
            for shard in shards:
                shard.close()
        assert not self.exceeded, self.exceeded
        assert min(self.num_looks.values()) > 1, "the budgets were hardly looked at"

    def _look_at_sums(self, service: Service) -> None:
        for tier, budget in self._tiers().items():
            self._check(f"metric {tier}", _used(service)[tier], budget)
        self._check("on disk", _on_disk(self.cache), self.disk)
        self.num_looks["sums"] += 1

    def _look_at_adapters(self, service: Service) -> None:
        adapters = requests.get(f"{service.url}/v1/adapters", timeout=60).json()["data"]
        slots = [a["groups"][0]["slot"] for a in adapters if a["tier"] == "device"]
        if len(set(slots)) < len(slots):
            self.exceeded.append("two adapters in one slot")
        self._check("slots", len(slots), self.slots)
        self._check(
            "device", sum(a["bytes"] for a in adapters if a["tier"] == "device"), self.device
        )
        self._check("host", _sum(adapters, ("host", "device"), "bytes"), self.host)
        self.num_looks["adapters"] += 1

    def _look_at_shards(self, shards: list[grpc.Channel]) -> None:
        for number, shard in enumerate(shards):
            held = [info for info in _held(shard) if info.tier >= Tier.HOST]
            self._check(f"shard {number}", sum(info.packed_bytes for info in held), self.host)
        self.num_looks["shards"] += 1

    def _tiers(self) -> dict[str, int]:
        return {"device": self.device, "host": self.host, "disk": self.disk}

    def _check(self, what: str, used: int, budget: int) -> None:
        self.most[what] = max(self.most.get(what, 0), used)
        if used > budget:
            self.exceeded.append(f"{what}: {used} of {budget} bytes at {time.time():.2f}")


def _sum(adapters: list[dict[str, Any]], tiers: tuple[str, ...], name: str) -> int:
    return sum(adapter[name] or 0 for adapter in adapters if adapter["tier"] in tiers)


def _used(service: Service) -> dict[str, int]:
    text = requests.get(f"{service.url}/metrics", timeout=60).text
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return {
        s.labels["tier"]: int(s.value) for s in samples if s.name == "lorafleet_adapter_tier_bytes"
    }


def _held(shard: grpc.Channel) -> list[AdapterInfo]:
    """What the process itself says."""
    call = shard.unary_unary(
        "/lorafleet.v1.Shard/ListAdapters", None, shard_pb2.ListAdaptersReply.FromString
    )
    return [decode(info) for info in call(b"", timeout=60).adapters]


def _on_disk(cache: Path) -> int:
    """Bytes of files of adapters, complete or on their way, that were there at one moment.

    Looking takes a while, in which files come and go: those that two looks found were there in
    between. A file that was moved with its adapter is still the same.
    """
    before, after = _files(cache), _files(cache)
    return sum(min(before[file], after[file]) for file in before.keys() & after.keys())


def _files(cache: Path) -> dict[tuple[str, int], int]:
    """Sizes by adapter and the file's number; numbers alone are used again at once."""
    found = {}
    for folder, _, names in os.walk(cache):
        for name in names:
            if name.startswith("adapter_"):
                with suppress(FileNotFoundError):  # dropped meanwhile
                    status = os.stat(os.path.join(folder, name))
                    found[os.path.basename(folder), status.st_ino] = status.st_size
    return found


def shard_addresses(service: Service) -> list[str]:
    """Of the shards, which only their own command lines tell."""
    found = psutil.Process(service.process.pid).children(recursive=True)
    lines = [process.cmdline() for process in found]
    words = [word for line in lines for word in line if word.startswith("--listen=")]
    return [word.removeprefix("--listen=") for word in words]
