"""AdapterStore: every adapter this rank knows below the device, and how it got there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from lorafleet.cache.adapter_files import AdapterSpec, digest_files, read_spec
from lorafleet.cache.errors import AdapterNotFound, AdapterUnservable, shown
from lorafleet.cache.host_tier import HostTier
from lorafleet.cache.key_locks import KeyLocks
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.packed_form import PackedForm, plan_form
from lorafleet.cache.packing import PackedAdapter, pack
from lorafleet.cache.sources.catalog import SourceConfig, open_sources
from lorafleet.cache.sources.source import AdapterSource, Progress
from lorafleet.proto.messages import (
    AdapterInfo,
    AdapterKey,
    DropAdapterRequest,
    FetchAdapterRequest,
    FetchProgress,
    Tier,
)


class StoreConfig(SourceConfig, Protocol):
    """The fields of ShardConfig that the store and its sources read."""

    @property
    def adapter_host_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter whose headers were read."""

    key: AdapterKey
    spec: AdapterSpec
    form: PackedForm
    digest: str = ""  # empty until the content was read


class AdapterStore:
    """What the shard's adapter RPCs call, from any thread.

    Work on one adapter is serial, so callers that ask for the same one at once share it; work on
    different adapters is not.
    """

    def __init__(
        self,
        config: StoreConfig,
        layout: ModelLayout,
        dtype: torch.dtype,
        device: torch.device,
        hub_endpoint: str | None = None,
    ) -> None:
        """`hub_endpoint`: base URL of the hub, None for what HF_ENDPOINT says."""
        self._layout, self._dtype = layout, dtype
        self._host = HostTier(config.adapter_host_bytes, dtype, pin=device.type == "cuda")
        self._sources: dict[str, AdapterSource] = open_sources(config, hub_endpoint)
        self._adapters: dict[AdapterKey, _Adapter] = {}
        self._locks = KeyLocks()

    def fetch(self, request: FetchAdapterRequest, progress: Progress) -> AdapterInfo:
        """Raises an adapter to DISK (found, valid, sized) or HOST (packed as well).

        An adapter that is held is held as it was read, whatever its source has by now; `drop`
        forgets it. Raises AdapterFault subclasses; `progress` must not raise.
        """
        key = request.key
        source = self._source(key)
        with self._locks.hold(key):
            if self._host.get(key) is not None:
                source.authorize(key, request.api_token)
                return self._info(self._adapters[key])
            directory = source.fetch(key, request.api_token, progress)
            adapter = self._read(key, directory, progress)
            if request.tier >= Tier.HOST:
                self._pack(adapter, progress)
            return self._info(adapter)

    def drop(self, request: DropAdapterRequest) -> None:
        """Forgets an adapter's copy in a tier and above; what is not there is dropped already."""
        key = request.key
        with self._locks.hold(key):
            self._host.drop(key)
            if request.tier <= Tier.DISK:
                self._adapters.pop(key, None)
                if source := self._sources.get(key.source):
                    source.drop(key)

    def list(self) -> list[AdapterInfo]:
        """Adapters that anyone may use without a remote source being asked, sorted by source, id.

        Those not fetched yet are there with an empty digest. What else takes disk (downloads for
        some callers only, or that cannot be served) is there as not public, so that it is counted.
        """
        infos = []
        for source in self._sources.values():
            for key, directory in source.list():
                with self._locks.hold(key):
                    try:
                        infos.append(self._info(self._glance(key, directory)))
                    except AdapterUnservable:
                        infos.append(_hidden(key, source.disk_bytes(key)))
            infos += [_hidden(key, source.disk_bytes(key)) for key in source.list_restricted()]
        held = self._host.keys()  # of one moment, so that together they fit the budget
        return [
            replace(info, tier=Tier.HOST if info.key in held else Tier.DISK)
            for info in infos
            if info.is_public or info.disk_bytes
        ]

    def host(self, key: AdapterKey) -> PackedAdapter:
        """The packed adapter, for a move to the device. Raises AdapterNotFound when not at HOST."""
        packed = self._host.get(key)
        if packed is None:
            raise AdapterNotFound(f"{shown(str(key))} is not in host memory.")
        return packed

    def _source(self, key: AdapterKey) -> AdapterSource:
        source = self._sources.get(key.source)
        if source is None:
            raise AdapterNotFound(
                f"There is no adapter source {shown(key.source)}; it must be one of "
                f"{', '.join(self._sources)}."
            )
        return source

    def _glance(self, key: AdapterKey, directory: Path) -> _Adapter:
        """The adapter as known, or as its headers say. Raises AdapterUnservable."""
        known = self._adapters.get(key)
        if known is not None and (self._host.get(key) is not None or known.spec.is_current()):
            return known
        spec = read_spec(directory, self._layout)
        ranks = {name: module.rank for name, module in spec.modules.items()}
        adapter = _Adapter(key, spec, plan_form(ranks, self._layout, self._dtype.itemsize))
        self._adapters[key] = adapter
        return adapter

    def _read(self, key: AdapterKey, directory: Path, progress: Progress) -> _Adapter:
        """The adapter with its digest. Raises AdapterUnservable."""
        adapter = self._glance(key, directory)
        if not adapter.digest:
            total = adapter.spec.nbytes
            digest = digest_files(
                adapter.spec, lambda done: progress(FetchProgress("reading", done, total))
            )
            adapter = self._adapters[key] = replace(adapter, digest=digest)
        return adapter

    def _pack(self, adapter: _Adapter, progress: Progress) -> None:
        total = adapter.spec.nbytes

        def report(done: int) -> None:
            progress(FetchProgress("packing", done, total))

        self._host.put(
            adapter.key,
            adapter.form,
            lambda packed: pack(adapter.spec, self._layout, packed, report),
        )

    def _info(self, adapter: _Adapter) -> AdapterInfo:
        key = adapter.key
        return AdapterInfo(
            key=key,
            digest=adapter.digest,
            rank=adapter.spec.rank,
            packed_bytes=adapter.form.nbytes,
            disk_bytes=self._sources[key.source].disk_bytes(key),
            target_modules=adapter.spec.target_modules,
            tier=Tier.DISK if self._host.get(key) is None else Tier.HOST,
        )


def _hidden(key: AdapterKey, disk_bytes: int) -> AdapterInfo:
    """Of an adapter nothing is told but what it takes."""
    return AdapterInfo(key, "", 0, 0, disk_bytes, [], Tier.DISK, is_public=False)
