"""The operations of `op` as CUDA kernels, for contiguous fp16 and bf16. See fused.cu."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_void_p
from functools import cache

import torch

from lorafleet.kernels.build import bind

_MAX_HIDDEN = 16384  # a block holds a row


def supports(x: torch.Tensor) -> bool:
    """Whether the kernels can serve this tensor's dtype, device and width."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.shape[-1] % 16 == 0


def rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Norm of `residual`, after `residual += x` where there is an x."""
    assert residual.shape[1] <= _MAX_HIDDEN
    out = torch.empty_like(residual)
    _entry_norm()(
        _is_half(residual), out.data_ptr(), residual.data_ptr(),
        None if x is None else x.contiguous().data_ptr(), weight.data_ptr(), *residual.shape, eps,
        _stream(),
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    rows, double = gate_up.shape
    out = gate_up.new_empty(rows, double // 2)
    _entry_silu()(
        _is_half(gate_up), out.data_ptr(), gate_up.data_ptr(), rows, double // 2, _stream()
    )
    return out


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
    """The queries, rotated; keys and values stored."""
    num_kv_heads, head_dim = keys.shape[-2:]
    num_tokens = len(qkv)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    query = qkv.new_empty(num_tokens, num_heads, head_dim)
    _entry_rotary()(
        _is_half(qkv), qkv.data_ptr(), query.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        keys.data_ptr(), values.data_ptr(), locations.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        num_tokens, num_heads, num_kv_heads, head_dim, cos.shape[1], eps, _stream(),
    )  # fmt: skip
    return query


def _is_half(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return int(tensor.dtype == torch.float16)


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@cache
def _entry_norm() -> Callable[..., None]:
    return bind("lorafleet_rms_norm", c_int, *[c_void_p] * 4, c_int, c_int, c_float, c_void_p)


@cache
def _entry_silu() -> Callable[..., None]:
    return bind("lorafleet_silu_mul", c_int, c_void_p, c_void_p, c_int, c_int, c_void_p)


@cache
def _entry_rotary() -> Callable[..., None]:
    return bind(
        "lorafleet_rotary_and_store", c_int, *[c_void_p] * 9, *[c_int] * 5, c_float, c_void_p
    )
