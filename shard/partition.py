"""Which part of each linear a rank holds.

Query heads, key/value heads and MLP columns are cut into equal runs, one run a rank. With fewer
key/value heads than ranks, neighbouring ranks hold the same head. A fused projection (`qkv_proj`,
`gate_up_proj`) is cut part by part, so its rank-local rows stay in the order its model expects.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from lorafleet.cache.layout import TargetModule
from lorafleet.shard.errors import UnsupportedModel

Interval = tuple[int, int]

# Linears that share one input, in the order their model calls them: one GEMM, one LoRA site.
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Partition:
    """One rank's share of the model's heads, MLP columns and vocabulary."""

    rank: int
    size: int
    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    num_experts: int = 0
    expert_size: int = 0  # intermediate size of one expert

    @classmethod
    def of(cls, config: Any, rank: int, size: int) -> Partition:
        """This rank's share of a transformers config. Raises UnsupportedModel if uneven."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        expert_size = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        check_even(config, size)
        return cls(
            rank, size, config.hidden_size, head_dim, heads, kv_heads,
            config.intermediate_size, config.vocab_size,
            getattr(config, "num_experts", 0), expert_size,
        )  # fmt: skip

    @property
    def local_heads(self) -> int:
        """Query heads on this rank."""
        return self.num_heads // self.size

    @property
    def local_kv_heads(self) -> int:
        """Key/value heads on this rank, at least one."""
        return max(1, self.num_kv_heads // self.size)

    @property
    def local_intermediate(self) -> int:
        """MLP columns on this rank."""
        return self.intermediate_size // self.size

    @property
    def local_vocab(self) -> int:
        """Vocabulary entries on every rank but perhaps the last, which has fewer."""
        return -(-self.vocab_size // self.size)

    @property
    def vocab_range(self) -> Interval:
        """Vocabulary entries of this rank, [start, stop)."""
        start = min(self.rank * self.local_vocab, self.vocab_size)
        return start, min(start + self.local_vocab, self.vocab_size)

    def local_config(self, config: Any) -> Any:
        """The config of a model that has exactly this rank's heads and MLP columns."""
        local = copy.deepcopy(config)
        local.head_dim = self.head_dim
        local.num_attention_heads = self.local_heads
        local.num_key_value_heads = self.local_kv_heads
        local.intermediate_size = self.local_intermediate
        return local

    def target(self, name: str) -> TargetModule:
        """The linear `name` of the whole model and the intervals of it that this rank holds."""
        query, key = self._query_range(), self._kv_range()
        query_width, key_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, everything = self.hidden_size, (0, self.hidden_size)
        intermediate = self.expert_size if ".experts." in name else self.intermediate_size
        mlp = self._run(intermediate // self.size)
        up = (hidden, intermediate, everything, (mlp,))
        down = (intermediate, hidden, mlp, (everything,))
        shapes: dict[str, tuple[int, int, Interval, tuple[Interval, ...]]] = {
            "q_proj": (hidden, query_width, everything, (query,)),
            "k_proj": (hidden, key_width, everything, (key,)),
            "v_proj": (hidden, key_width, everything, (key,)),
            "qkv_proj": (
                hidden,
                query_width + 2 * key_width,
                everything,
                (query, _shift(key, query_width), _shift(key, query_width + key_width)),
            ),
            "o_proj": (query_width, hidden, query, (everything,)),
            "gate_proj": up,
            "up_proj": up,
            "gate_up_proj": (
                hidden, 2 * intermediate, everything, (mlp, _shift(mlp, intermediate)),
            ),
            "down_proj": down,
            "w1": up,
            "w3": up,
            "w2": down,
            "gate": (hidden, self.num_experts, everything, ((0, self.num_experts),)),
        }  # fmt: skip
        last = name.rsplit(".", 1)[-1]
        if last not in shapes:
            raise UnsupportedModel(f"cannot cut the linear {name!r} between ranks")
        in_features, out_features, in_range, out_ranges = shapes[last]
        return TargetModule(name, in_features, out_features, in_range, out_ranges)

    def _run(self, length: int) -> Interval:
        return self.rank * length, (self.rank + 1) * length

    def _query_range(self) -> Interval:
        return self._run(self.local_heads * self.head_dim)

    def _kv_range(self) -> Interval:
        first = self.rank * self.num_kv_heads // self.size
        return first * self.head_dim, (first + self.local_kv_heads) * self.head_dim


def _shift(interval: Interval, by: int) -> Interval:
    return interval[0] + by, interval[1] + by


def check_even(config: Any, size: int) -> None:
    """Raises UnsupportedModel when a number that `config` has cannot be shared by `size` ranks."""
    for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size"):
        value = _count(config, name)
        if value % size:
            raise UnsupportedModel(f"{name} {value} is not divisible by --num-shard {size}")
    kv_heads = _count(config, "num_key_value_heads")
    if kv_heads % size and size % kv_heads:
        raise UnsupportedModel(
            f"num_key_value_heads {kv_heads} cannot be shared by --num-shard {size}: "
            "one must divide the other"
        )


def _count(config: Any, name: str) -> int:
    """A number of a config; 0, which is shared by all, where a config.json leaves it out."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
