"""Decoder layers of the Llama shape, run as a short line of fused operations.

transformers' modules hold the weights and say what a layer is; what is fused here is only the way
between the matrix products: residual sum with norm, rotary embedding with the KV store, activation
with its product. A decoder with layers of another shape runs transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lorafleet.kernels.fused.op import add_rms_norm_, rms_norm, rotary_and_store_
from lorafleet.shard.attention import AttentionKind, PagedBatch, attention_kind
from lorafleet.shard.layers import ColumnSite, Site

# h + attention(norm(h)), then h + down(silu(gate) * up) of norm(h): these and nothing else.
_LLAMA_SHAPE = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Phi3DecoderLayer",
)
# Rotary tables that do not depend on how long the running sequences are.
_STATIC_ROPE = ("default", "linear", "yarn", "llama3")

# Rows [num_tokens, any] in, rows of some of the tokens out; it also tells the sites whose they are.
Keep = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's parts; q_norm and k_norm are per-head norms (Qwen3)."""

    index: int
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: Site
    o: Site
    gate_up: ColumnSite
    down: Site
    kind: AttentionKind


class FusedLayers:
    """All layers of one decoder, with the final norm: embeddings in, hidden states out."""

    def __init__(self, base: Any, max_len: int) -> None:
        """`base` is a loaded transformers decoder for which `fits` holds; `max_len` in tokens."""
        self._layers = [_layer(module, i) for i, module in enumerate(base.layers)]
        self._final_norm: torch.Tensor = base.norm.weight.data
        self._eps: float = base.norm.variance_epsilon
        self._cos, self._sin = _rotary_table(base, max_len)

    @staticmethod
    def fits(base: Any) -> bool:
        """Whether every layer has the Llama shape and positions embed by a fixed table."""
        return (
            all(type(layer).__name__ in _LLAMA_SHAPE for layer in base.layers)
            and base.rotary_emb.rope_type in _STATIC_ROPE
            and base.config.hidden_act == "silu"
        )

    def forward(
        self,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        paged: PagedBatch,
        keep: Keep | None = None,
    ) -> torch.Tensor:
        """[num_tokens, hidden] embeddings and [num_tokens] positions -> [num_tokens, hidden].

        `embedded` is overwritten: it carries the residual stream. With `keep`, only the tokens that
        it keeps go on after the last attention, and are in the result.
        """
        cos, sin = self._cos[positions], self._sin[positions]
        residual, eps = embedded, self._eps
        x = rms_norm(residual, self._layers[0].input_norm, eps)
        for layer, following in zip(self._layers, [*self._layers[1:], None], strict=True):
            attended = self._attend(layer, x, cos, sin, paged)
            if following is None and keep is not None:
                attended, residual = keep(attended, residual)
                if not len(residual):
                    return residual
            o, pending = layer.o.product(attended)
            x = add_rms_norm_(o, residual, layer.post_norm, eps, pending)
            down, pending = layer.down.product(layer.gate_up.activated(x))
            norm = self._final_norm if following is None else following.input_norm
            x = add_rms_norm_(down, residual, norm, eps, pending)
        return x

    def _attend(
        self,
        layer: _Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        paged: PagedBatch,
    ) -> torch.Tensor:
        qkv, pending = layer.qkv.product(x)
        keys, values = paged.pool.keys[layer.index], paged.pool.values[layer.index]
        query = rotary_and_store_(
            qkv, cos, sin, keys, values, paged.locations, layer.q_norm, layer.k_norm, self._eps,
            pending,
        )  # fmt: skip
        return paged.attend(layer.index, query, layer.kind).flatten(1)


def _layer(module: Any, index: int) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return _Layer(
        index=index,
        input_norm=module.input_layernorm.weight.data,
        post_norm=module.post_attention_layernorm.weight.data,
        q_norm=None if q_norm is None else q_norm.weight.data,
        k_norm=None if k_norm is None else k_norm.weight.data,
        qkv=_site(attention, "q_proj_k_proj_v_proj", "qkv_proj"),
        o=attention.o_proj,
        gate_up=_site(mlp, "gate_proj_up_proj", "gate_up_proj"),
        down=mlp.down_proj,
        kind=attention_kind(attention),
    )


def _site(module: Any, *names: str) -> ColumnSite:
    """The merged site, under the name the swap or the family gave it."""
    found: ColumnSite = next(child for name, child in module.named_children() if name in names)
    return found


def _rotary_table(base: Any, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_len, rotary_dim] in the serving dtype, by the model's own module."""
    weight = base.norm.weight
    positions = torch.arange(max_len, device=weight.device).unsqueeze(0)
    cos, sin = base.rotary_emb(weight, position_ids=positions)
    return cos[0].contiguous(), sin[0].contiguous()
