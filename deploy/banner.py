"""The banner: what is being served, where, in how much memory, and how to try it."""

from __future__ import annotations

from typing import Any

from lorafleet.proto.flags import Bytes
from lorafleet.router.config import RouterConfig
from lorafleet.shard.config import ShardConfig


def banner(info: dict[str, Any], shard: ShardConfig, router: RouterConfig, url: str) -> str:
    """Its lines. `info` is of rank 0's ready event, `url` of the router's."""
    rows = {
        "URL": url,
        "model": f"{info['model_id']} ({info['architecture']}, {info['dtype']})",
        "shards": f"{shard.num_shard} on {info['device']}",
        "KV cache": f"{info['num_pages'] * info['page_size']:,} tokens, "
        f"{info['max_model_len']:,} per sequence at most",
        "adapters": f"{Bytes(info['arena_bytes'])} on the device ({info['num_slots']:,} at once), "
        f"{Bytes(info['host_bytes'])} in host memory, per shard; "
        f"{shard.adapter_disk_bytes} on disk",
        "adapter root": f"{shard.adapter_root or 'none'} "
        f"(adapter_source defaults to {router.adapter_source})",
    }
    lines = [f"  {name:<13} {value}" for name, value in rows.items()]
    return "\n".join(["", "lorafleet is ready", *lines, "", _curl(url), ""])


def _curl(url: str) -> str:
    body = '{"inputs": "Write a short poem about the sea.", "parameters": {"max_new_tokens": 64}}'
    return f"curl {url}/generate -H 'Content-Type: application/json' -d '{body}'"
