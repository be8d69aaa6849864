"""Base models by their shapes, and the fewest bytes that a decode step of them can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

BYTES = 2  # of a bf16 value
_BLOCK_ALIGNMENT = 256  # bytes
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; by default 32 layers with 8 KV heads of 128, as Llama-3.1-8B has."""

    name: str
    vocab_size: int
    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def config(self) -> PreTrainedConfig:
        """The transformers config, for random weights."""
        kind = LlamaConfig if self.name.startswith("llama") else MistralConfig
        extra: dict[str, Any] = {} if kind is LlamaConfig else {"sliding_window": None}
        return kind(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            architectures=[f"{kind.__name__.removesuffix('Config')}ForCausalLM"],
            dtype="bfloat16",
            bos_token_id=1,
            eos_token_id=2,
            **extra,
        )

    @property
    def _kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def weight_bytes(self) -> int:
        """Every linear layer and the head, read once."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self._kv_width
        linear = self.layers * (attention + 3 * self.hidden * self.intermediate)
        return BYTES * (linear + self.vocab_size * self.hidden)

    def kv_bytes(self, rows: int, context: int) -> int:
        """Keys and values of `rows` sequences of `context` tokens."""
        return rows * context * 2 * self.layers * self._kv_width * BYTES

    def adapter_bytes(self, rank: int, targets: Sequence[str] = ALL_LINEAR) -> int:
        """A and B of these linear layers, in every layer of the model."""
        sums = sum(sum(self.features(target)) for target in targets)
        return BYTES * rank * self.layers * sums

    def packed_bytes(self, rank: int, targets: Sequence[str] = ALL_LINEAR) -> int:
        """What an adapter takes on the device at most: its blocks start at multiples of 256."""
        blocks = 2 * self.layers * len(targets)
        return self.adapter_bytes(rank, targets) + blocks * _BLOCK_ALIGNMENT

    def features(self, target: str) -> tuple[int, int]:
        """What a projection takes and gives: in_features, out_features."""
        heads = self.heads * self.head_dim
        return {
            "q_proj": (self.hidden, heads),
            "k_proj": (self.hidden, self._kv_width),
            "v_proj": (self.hidden, self._kv_width),
            "o_proj": (heads, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[target]

    def floor_ms(
        self, rows: int, context: int, adapters: int, rank: int, bandwidth: float
    ) -> float:
        """Bytes over `bandwidth` in bytes/s: what no implementation in bf16 goes below."""
        total = self.weight_bytes() + self.kv_bytes(rows, context)
        return 1e3 * (total + adapters * self.adapter_bytes(rank)) / bandwidth


SHAPES = {
    "llama-8b": Shape("llama-8b", 128256),
    "mistral-7b": Shape("mistral-7b", 32000),
    # Small enough for a CPU, where it shows that a part runs and nothing about speed.
    "llama-tiny": Shape("llama-tiny", 512, 64, 128, layers=2, heads=4, kv_heads=2, head_dim=16),
}
