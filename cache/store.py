"""AdapterStore: every adapter this rank knows below the device, and how it got there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from lorafleet.cache.adapter_files import AdapterSpec, digest_files, file_states, read_spec
from lorafleet.cache.base_tables import BaseTables
from lorafleet.cache.base_weights import BaseWeights
from lorafleet.cache.errors import (
    AdapterFault,
    AdapterNotFound,
    AdapterUnservable,
    SourceUnavailable,
    shown,
)
from lorafleet.cache.host_tier import HostTier
from lorafleet.cache.key_locks import KeyLocks
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.packed_form import PackedForm
from lorafleet.cache.packing import PackedAdapter, pack, read_tensor
from lorafleet.cache.sources.catalog import SourceConfig, open_sources
from lorafleet.cache.sources.source import AdapterSource, Progress
from lorafleet.cache.tokenizer_files import read_tokenizer
from lorafleet.proto.messages import (
    AdapterContent,
    AdapterInfo,
    AdapterKey,
    AdapterTokenizer,
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
    tokenizer_digest: str = ""  # of its own tokenizer; empty where it has none


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
        base: BaseWeights | None = None,
        base_tokenizer: bytes = b"",
    ) -> None:
        """`hub_endpoint`: base URL of the hub, None for what HF_ENDPOINT says.

        `base`: the base model's own weights; with None adapters whose result depends on them are
        refused, and adapters' copies of them take room. `base_tokenizer`: see MergedSource.
        """
        self._layout, self._dtype, self._base = layout, dtype, base
        self._tables = None if base is None else BaseTables(base, layout.vocabulary, dtype)
        self._allow_pickles = config.allow_pickled_adapters
        self._host = HostTier(config.adapter_host_bytes, dtype, pin=device.type == "cuda")
        self._sources: dict[str, AdapterSource] = open_sources(
            config, layout, hub_endpoint, base_tokenizer
        )
        self._adapters: dict[AdapterKey, _Adapter] = {}  # as they are at present
        self._held: dict[AdapterContent, _Adapter] = {}  # in host memory, older ones too
        self._locks = KeyLocks()

    def fetch(self, request: FetchAdapterRequest, progress: Progress) -> AdapterInfo:
        """Raises an adapter to DISK (found, valid, sized) or HOST (packed as well).

        What host memory has is as it was read, whatever its source has by now, unless a `refresh`
        is asked for: then what is there is the adapter, and older content stays, for those who know
        its digest, until it is dropped. Of a digest that is not there nothing is packed. Raises
        AdapterFault subclasses; `progress` must not raise.
        """
        key = request.key
        source = self._source(key)
        with self._locks.hold(key):
            held = None if request.refresh else self._held_as(key, request.digest)
            if held is None:
                return self._info(self._fetch(source, request, progress))
            source.authorize(key, request.api_token)
            return self._info(held)

    def drop(self, request: DropAdapterRequest) -> None:
        """Forgets an adapter's copy in a tier and above; what is not there is dropped already.

        Other contents than the digest's stay in host memory, if there is one.
        """
        key, content = request.key, AdapterContent(request.key, request.digest)
        if content in self._held and request.tier > Tier.DISK:
            # Waits for no source that this adapter is asked of meanwhile: others need the room.
            self._drop_content(content)
            return
        with self._locks.hold(key):
            if request.digest:
                self._drop_content(content)
            else:
                for content in self._host.contents():
                    if content.key == key:
                        self._drop_content(content)
            if request.tier <= Tier.DISK:
                self._adapters.pop(key, None)
                if source := self._sources.get(key.source):
                    source.drop(key)

    def list(self) -> list[AdapterInfo]:
        """Adapters that anyone may use without a remote source being asked, sorted by source, id.

        Those not fetched yet are there with an empty digest, those being packed as if they were in
        host memory, since they take room there. What else takes disk (downloads for some callers
        only, that cannot be served, or that nobody has read yet) is there as not public, so that it
        is counted. Waits for no work on an adapter.
        """
        infos = []
        for source in self._sources.values():
            for key, directory in source.list():
                # What a process died of, or hung in, would have the next one die at its start.
                if not source.was_read(key):
                    infos.append(self._hidden(key, source))
                    continue
                try:
                    infos.append(self._info(self._listed(key, directory)))
                except AdapterUnservable:
                    infos.append(self._hidden(key, source))
            infos += [self._hidden(key, source) for key in source.list_restricted()]
        held = self._host.contents()  # of one moment, so that together they fit the budget
        return [
            replace(info, tier=Tier.HOST if info.content in held else Tier.DISK)
            for info in infos
            if info.is_public or info.disk_bytes
        ]

    def tokenizer(self, key: AdapterKey) -> AdapterTokenizer:
        """What the adapter's files say now of its tokenizer. Raises AdapterFault."""
        with self._locks.hold(key):
            adapter = self._adapters.get(key)
            if adapter is None:
                raise AdapterNotFound(f"{shown(str(key))} is not here any more; fetch it again.")
            found = read_tokenizer(adapter.spec.directory)
            return AdapterTokenizer(found.digest, found.tokenizer_json, found.config_json)

    def host(self, content: AdapterContent) -> PackedAdapter:
        """The packed adapter, for a move to the device. Raises AdapterNotFound when not at HOST."""
        packed = self._host.get(content)
        if packed is None:
            raise AdapterNotFound(f"{shown(str(content.key))} is not in host memory.")
        return packed

    def drop_superseded(self) -> None:
        """Forgets contents that only those who began before a refresh know. Waits for no work."""
        for content in self._host.contents():
            present = self._adapters.get(content.key)
            if present is None or present.digest != content.digest:
                self._drop_content(content)

    def _fetch(
        self, source: AdapterSource, request: FetchAdapterRequest, progress: Progress
    ) -> _Adapter:
        """What the source has, packed if that is asked for. Files that change meanwhile, since
        other ranks' processes share them, are read once more."""
        directory = source.fetch(request.key, request.api_token, progress, request.refresh)
        states = self._states(directory)
        try:
            return self._taken(source, directory, request, progress)
        except AdapterFault:
            if self._states(directory) == states:
                raise
        directory = source.fetch(request.key, request.api_token, progress)
        return self._taken(source, directory, request, progress)

    def _taken(
        self,
        source: AdapterSource,
        directory: Path,
        request: FetchAdapterRequest,
        progress: Progress,
    ) -> _Adapter:
        adapter = self._read(request.key, directory, progress)
        if self._states(directory) == adapter.spec.states:
            source.note_read(request.key)
        is_meant = request.digest in ("", adapter.digest)
        if request.tier >= Tier.HOST and is_meant and not self._holds(adapter):
            self._pack(adapter, progress)
        return adapter

    def _states(self, directory: Path) -> object:
        """Tells whether any of the files is another; None where they are not an adapter's."""
        try:
            return file_states(directory, self._allow_pickles)
        except AdapterUnservable:
            return None

    def _held_as(self, key: AdapterKey, digest: str) -> _Adapter | None:
        """The adapter that host memory has, of this content or of the present one."""
        present = self._adapters.get(key)
        known = digest or (present.digest if present is not None else "")
        return self._held.get(AdapterContent(key, known))

    def _source(self, key: AdapterKey) -> AdapterSource:
        source = self._sources.get(key.source)
        if source is None:
            raise AdapterNotFound(
                f"There is no adapter source {shown(key.source)}; it must be one of "
                f"{', '.join(self._sources)}."
            )
        return source

    def _listed(self, key: AdapterKey, directory: Path) -> _Adapter:
        """As `_glance`; but what somebody works on is left as it is known, or only looked at."""
        with self._locks.hold(key, wait=False) as is_held:
            if is_held:
                return self._glance(key, directory)
            return self._adapters.get(key) or self._headers(key, directory)

    def _glance(self, key: AdapterKey, directory: Path) -> _Adapter:
        """The adapter as known, or as its headers say. Raises AdapterUnservable."""
        known = self._adapters.get(key)
        if known is not None and (self._holds(known) or known.spec.is_current()):
            return known
        adapter = self._adapters[key] = self._headers(key, directory)
        return adapter

    def _holds(self, adapter: _Adapter) -> bool:
        """Whether host memory has this content."""
        return AdapterContent(adapter.key, adapter.digest) in self._held

    def _headers(self, key: AdapterKey, directory: Path) -> _Adapter:
        """The adapter as its headers say. Raises AdapterUnservable."""
        spec = read_spec(directory, self._layout, self._base, self._allow_pickles)
        return _Adapter(key, spec, spec.form(self._layout, self._dtype.itemsize))

    def _read(self, key: AdapterKey, directory: Path, progress: Progress) -> _Adapter:
        """The adapter with its digest, as its files are now. Raises AdapterUnservable."""
        known = self._adapters.get(key)
        is_current = known is not None and known.spec.is_current()
        adapter = known if known and is_current else self._headers(key, directory)
        if not adapter.digest:
            total = adapter.spec.nbytes
            digest = digest_files(
                adapter.spec, lambda done: progress(FetchProgress("reading", done, total))
            )
            tokenizer = read_tokenizer(directory)
            spec = self._without_copies(adapter.spec)
            adapter = _Adapter(
                key, spec, spec.form(self._layout, self._dtype.itemsize), digest, tokenizer.digest
            )
            self._adapters[key] = adapter
        return adapter

    def _without_copies(self, spec: AdapterSpec) -> AdapterSpec:
        """The spec with room for what the adapter has of the vocabulary that the base has not."""
        tables = self._tables
        if tables is None or not spec.parts:
            return spec
        found = read_spec(
            spec.directory,
            self._layout,
            self._base,
            self._allow_pickles,
            lambda module, table: tables.differing(module, read_tensor(spec, table)),
        )
        if found.states != spec.states:
            raise SourceUnavailable("The adapter's files changed while they were read; try again.")
        return found

    def _pack(self, adapter: _Adapter, progress: Progress) -> None:
        total = adapter.spec.nbytes

        def report(done: int) -> None:
            progress(FetchProgress("packing", done, total))

        content = AdapterContent(adapter.key, adapter.digest)
        self._host.put(
            content, adapter.form, lambda packed: pack(adapter.spec, self._layout, packed, report)
        )
        self._held[content] = adapter

    def _drop_content(self, content: AdapterContent) -> None:
        self._held.pop(content, None)
        self._host.drop(content)

    def _info(self, adapter: _Adapter) -> AdapterInfo:
        key = adapter.key
        return AdapterInfo(
            key=key,
            digest=adapter.digest,
            rank=adapter.spec.rank,
            packed_bytes=adapter.form.nbytes,
            disk_bytes=self._sources[key.source].disk_bytes(key),
            target_modules=adapter.spec.target_modules,
            tier=Tier.HOST if self._holds(adapter) else Tier.DISK,
            piece_bytes=adapter.form.piece_bytes,
            vocab_size=adapter.spec.num_tokens,
            tokenizer_digest=adapter.tokenizer_digest,
        )

    def _hidden(self, key: AdapterKey, source: AdapterSource) -> AdapterInfo:
        """Of an adapter nothing is told but what it takes, and the name of that."""
        held = self._held_as(key, "")
        digest, nbytes = (held.digest, held.form.nbytes) if held is not None else ("", 0)
        disk_bytes = source.disk_bytes(key)
        return AdapterInfo(key, digest, 0, nbytes, disk_bytes, [], Tier.DISK, is_public=False)
