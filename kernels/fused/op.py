"""Fused small operations of a decoder layer.

Semantics, rounding to the serving dtype where transformers' modules do:
    rms_norm(x)                 x / sqrt(mean(x^2) + eps) in float32, rounded, times weight
    add_rms_norm_(x, residual)  residual += x, then rms_norm(residual)
    silu_mul(gate_up)           silu(gate), rounded, times up
    silu_product(x)             silu_mul of x @ weight^T + bias, adapters' updates included
    rotary_and_store_(qkv)      q and k, normed per head if weights are given, become
                                x * cos + rotate_half(x) * sin; k and v go to the paged pool

Arguments:
    x, residual  [num_tokens, hidden], serving dtype; residual is written in place.
    weight       [hidden], serving dtype.
    gate_up      [num_tokens, 2 * intermediate]: gate, then up.
    weight, bias, adapters of silu_product: as lora_product takes them; the outputs are gate_up.
    qkv          [num_tokens, (heads + 2 * kv_heads) * head_dim]: all q, all k, all v.
    cos, sin     [num_tokens, rotary_dim]; dimensions from rotary_dim on are left as they are.
    keys, values [num_pages, page_size, kv_heads, head_dim], written at `locations`.
    locations    int64 [num_tokens]: page * page_size + offset.
    pending      what the product in x, gate_up or qkv still lacks; the op adds it first. A product
                 given with it may be overwritten.
"""

from __future__ import annotations

import torch

from lorafleet.kernels.fused import cuda, reference
from lorafleet.kernels.linear import cuda as stream
from lorafleet.kernels.linear.op import linear
from lorafleet.kernels.lora.cuda import updated_silu
from lorafleet.kernels.lora.op import LoraBatch, Pending, lora_product
from lorafleet.kernels.lora.weights import SiteWeights


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See the module's docstring; [num_tokens, hidden]."""
    if cuda.norms(x):
        return cuda.rms_norm(None, x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm_(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    pending: Pending | None = None,
) -> torch.Tensor:
    """See the module's docstring; [num_tokens, hidden]."""
    if pending is not None and not cuda.norms_pending(x, pending):
        pending.add_(x)
        pending = None
    if cuda.norms(residual):
        return cuda.rms_norm(x, residual, weight, eps, pending)
    return reference.add_rms_norm_(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor, pending: Pending | None = None) -> torch.Tensor:
    """See the module's docstring; [num_tokens, intermediate]."""
    if cuda.multiplies(gate_up):
        return cuda.silu_mul(gate_up, pending)
    if pending is not None:
        pending.add_(gate_up)
    return reference.silu_mul(gate_up)


def silu_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    adapters: tuple[SiteWeights, LoraBatch] | None = None,
) -> torch.Tensor:
    """See the module's docstring; [num_tokens, intermediate]."""
    is_gated = stream.supports_gated(x, weight)
    if adapters is None or adapters[1].is_empty:
        if is_gated:
            return stream.linear(x, weight, bias, is_gated=True)
        return silu_mul(linear(x, weight, bias))
    site, batch = adapters
    if is_gated and batch.is_few and site.has_kernels:
        return updated_silu(x, weight, bias, site, batch.row_slots, batch.max_rank)
    return silu_mul(*lora_product(x, weight, bias, site, batch))


def rotary_and_store_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    locations: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    pending: Pending | None = None,
) -> torch.Tensor:
    """See the module's docstring; the queries [num_tokens, heads, head_dim]."""
    if pending is not None and not cuda.rotates_pending(keys, pending):
        pending.add_(qkv)
        pending = None
    if cuda.rotates(keys, cos):
        return cuda.rotary_and_store_(
            qkv, cos, sin, keys, values, locations, q_norm, k_norm, eps, pending
        )
    if pending is not None:
        pending.add_(qkv)
    return reference.rotary_and_store_(qkv, cos, sin, keys, values, locations, q_norm, k_norm, eps)
