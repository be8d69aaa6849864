"""EngineStats: the engine's gauges and counters at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.proto.messages import Tier
from lorafleet.router.adapter import AdapterStatus


@dataclass(frozen=True, slots=True)
class TierStats:
    """What adapters take of one tier, on each shard."""

    used_bytes: int
    budget_bytes: int
    num_evictions: int  # adapters that made room for others


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges are of this moment, `num_*` counters since the start."""

    running: int  # sequences with a row
    waiting: int  # sequences without one
    used_pages: int  # KV pages sequences hold
    free_pages: int  # KV pages to be had: free, or cached and held by nobody
    cached_pages: int  # of the free ones, those with a cached prefix
    num_steps: int
    num_preemptions: int
    num_prefix_query_tokens: int  # known tokens of admitted sequences
    num_prefix_hit_tokens: int  # of those, tokens found in the prefix cache
    num_page_evictions: int  # cached pages given to somebody else
    max_adapters_in_step: int  # distinct adapters in one step, largest of the last 1024 steps
    tiers: dict[Tier, TierStats]
    adapters: list[AdapterStatus]
