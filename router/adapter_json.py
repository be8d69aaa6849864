"""Adapters as the management API shows them. Nothing here is secret: tokens are kept nowhere."""

from __future__ import annotations

from typing import Any

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.adapter import AdapterStatus
from lorafleet.router.usage import Usage

GROUP = 0  # the only group of shards there is


def to_object(
    key: AdapterKey, status: AdapterStatus | None, usage: Usage, aliases: list[str]
) -> dict[str, Any]:
    """One adapter; without status it is only a name, in no tier. Times in seconds, sizes in bytes.

    `bytes` are on each shard, `last_used_at` counts from the epoch.
    """
    info = status.info if status else None
    tier = status.tier if status else Tier.NONE
    return {
        "id": key.id,
        "object": "adapter",
        "source": key.source,
        "revision": key.revision or None,
        "digest": (info.digest or None) if info else None,
        "rank": info.rank if info else None,
        "target_modules": info.target_modules if info else [],
        "bytes": info.packed_bytes if info else None,
        "disk_bytes": info.disk_bytes if info else None,
        "tier": _name(tier),
        "groups": [{"group": GROUP, "tier": _name(tier), "slot": status.slot if status else 0}],
        "pinned": _name(status.pinned) if status and status.pinned else None,
        "aliases": aliases,
        "in_use": status.in_use if status else 0,
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "generated_tokens": usage.generated_tokens,
        "last_used_at": usage.last_used_at or None,
        "load_seconds": {
            _name(to): round(seconds, 6) for to, seconds in sorted(usage.load_seconds.items())
        },
    }


def _name(tier: Tier) -> str:
    return tier.name.lower()
