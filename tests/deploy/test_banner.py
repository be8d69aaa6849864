"""The banner's numbers and addresses."""

from __future__ import annotations

import json
import shlex

from lorafleet.deploy.banner import banner
from lorafleet.router.config import RouterConfig
from lorafleet.shard.config import ShardConfig
from tests.deploy.stand_in import INFO


def shown(root: str = "") -> str:
    shard = ShardConfig(model_id="m", num_shard=2, adapter_root=root)
    router = RouterConfig(adapter_source="local" if root else "hub")
    return banner(INFO, shard, router, "http://127.0.0.1:8080")


def test_it_tells_sizes_with_units() -> None:
    text = shown(root="/adapters")
    assert "stand-in (LlamaForCausalLM, float32)" in text
    assert "2 on cpu" in text
    assert "8,192 tokens, 2,048 per sequence at most" in text
    assert "1GiB on the device (64 at once), 4GiB in host memory, per shard; 20GiB on disk" in text
    assert "/adapters (adapter_source defaults to local)" in text
    assert "none (adapter_source defaults to hub)" in shown()


def test_the_curl_line_can_be_pasted() -> None:
    line = next(line for line in shown().splitlines() if line.startswith("curl"))
    words = shlex.split(line)
    assert words[1] == "http://127.0.0.1:8080/generate"
    assert json.loads(words[-1])["parameters"] == {"max_new_tokens": 64}
