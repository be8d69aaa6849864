"""The operations of `op` in plain torch: what a CPU runs, and the oracle of the CUDA kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm's result is rounded before the weight is applied, as transformers does."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def add_rms_norm_(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds to `residual` in place."""
    return rms_norm(residual.add_(x), weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[num_tokens, 2 * intermediate] -> [num_tokens, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


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
) -> torch.Tensor:
    """The queries [num_tokens, heads, head_dim]."""
    num_kv_heads, head_dim = keys.shape[-2:]
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        rotated = _rotate(
            torch.cat((rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)), 1), cos, sin
        )
    else:
        rotated = _rotate(heads[:, :-num_kv_heads], cos, sin)
    keys.flatten(0, 1).index_copy_(0, locations, rotated[:, -num_kv_heads:])
    values.flatten(0, 1).index_copy_(0, locations, v)
    return rotated[:, :-num_kv_heads]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotary embedding (Su 2021, in GPT-NeoX's layout) of [num_tokens, heads, d]."""
    rotary_dim = cos.shape[-1]
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    result: torch.Tensor = (turned * cos.unsqueeze(1)).add_(half.mul_(sin.unsqueeze(1)))
    return torch.cat((result, kept), dim=-1) if kept.numel() else result
