"""Every source there is, by the name requests use, made from the shard's flags."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lorafleet.cache.disk_tier import DiskTier
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.merging import recipe
from lorafleet.cache.sources import http, hub, local, merged, s3
from lorafleet.cache.sources.source import AdapterSource, Patience


class SourceConfig(Protocol):
    """The fields of ShardConfig that sources read."""

    @property
    def adapter_disk_bytes(self) -> int: ...
    @property
    def adapter_root(self) -> str: ...
    @property
    def adapter_cache_dir(self) -> str: ...
    @property
    def adapter_s3_endpoint(self) -> str: ...
    @property
    def adapter_s3_buckets(self) -> tuple[str, ...]: ...
    @property
    def adapter_http_hosts(self) -> tuple[str, ...]: ...
    @property
    def adapter_archive_bytes(self) -> int: ...
    @property
    def allow_pickled_adapters(self) -> bool: ...
    @property
    def adapter_answer_seconds(self) -> float: ...
    @property
    def adapter_download_seconds(self) -> float: ...


def open_sources(
    config: SourceConfig,
    layout: ModelLayout,
    hub_endpoint: str | None = None,
    base_tokenizer: bytes = b"",
) -> dict[str, AdapterSource]:
    """All but the local one share one disk tier and its budget; merging takes from the others.

    `hub_endpoint`: base URL of the hub, None for what HF_ENDPOINT says. `base_tokenizer`: see
    MergedSource. Raises ValueError naming a flag.
    """
    disk = DiskTier(Path(config.adapter_cache_dir).expanduser(), config.adapter_disk_bytes)
    patience = Patience(config.adapter_answer_seconds, config.adapter_download_seconds)
    pickles = config.allow_pickled_adapters
    sources: dict[str, AdapterSource] = {
        local.SOURCE: local.LocalSource(config.adapter_root),
        hub.SOURCE: hub.HubSource(disk, hub_endpoint, patience, pickles),
        s3.SOURCE: s3.S3Source(
            disk, config.adapter_s3_endpoint, config.adapter_s3_buckets, patience, pickles
        ),
        http.SOURCE: http.HttpSource(
            disk, config.adapter_http_hosts, config.adapter_archive_bytes, patience, pickles
        ),
    }
    merges = merged.MergedSource(disk, sources, layout, pickles, base_tokenizer)
    return sources | {recipe.SOURCE: merges}
