"""The operations of `op` as CUDA kernels, for contiguous fp16 and bf16."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, byref, c_float, c_int, c_void_p
from functools import cache
from typing import Any

import torch

from lorafleet.kernels.build import bind
from lorafleet.kernels.linear import cuda as stream
from lorafleet.kernels.lora.cuda import PendingArguments, pending_arguments
from lorafleet.kernels.lora.op import Pending

_MAX_HIDDEN = 16384  # a block holds a row
_MAX_PENDING_HIDDEN = 8192
# A block reads all of a row's B: beyond, the expand's many blocks are faster than one launch less.
_MAX_PENDING_RANK = 16
_MAX_HEAD_DIM = 256  # a warp holds a head
_TILE_OUTS = 256  # of long segments; whole heads


def norms(x: torch.Tensor) -> bool:
    """Whether `rms_norm` can take rows like these."""
    return _is_served(x) and x.shape[-1] % 8 == 0 and x.shape[-1] <= _MAX_HIDDEN


def norms_pending(x: torch.Tensor, pending: Pending) -> bool:
    """Whether `rms_norm` adds what is pending, and is the faster for it."""
    return (
        norms(x)
        and not pending.is_tiled
        and x.shape[1] <= _MAX_PENDING_HIDDEN
        and pending.max_rank <= _MAX_PENDING_RANK
        and stream.is_hopper(x.device)
    )


def multiplies(gate_up: torch.Tensor) -> bool:
    """Whether `silu_mul` can take rows like these."""
    return _is_served(gate_up) and gate_up.shape[-1] % 16 == 0


def rotates(keys: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether `rotary_and_store_` can take heads like these."""
    head_dim, rotary_dim = keys.shape[-1], cos.shape[-1]
    return (
        _is_served(keys)
        and head_dim % 8 == 0
        and head_dim <= _MAX_HEAD_DIM
        and rotary_dim % 16 == 0
    )


def rotates_pending(keys: torch.Tensor, pending: Pending) -> bool:
    """Whether `rotary_and_store_`, if it takes these heads, adds what is pending."""
    return not pending.is_tiled or _TILE_OUTS % keys.shape[-1] == 0


def rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    pending: Pending | None = None,
) -> torch.Tensor:
    """Norm of `residual`, after `residual += x` where there is an x."""
    out = torch.empty_like(residual)
    _entry_norm()(
        _is_half(residual), out.data_ptr(), residual.data_ptr(),
        None if x is None else x.contiguous().data_ptr(), weight.data_ptr(), *residual.shape, eps,
        _address(pending), _stream(),
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor, pending: Pending | None = None) -> torch.Tensor:
    """silu(gate) * up."""
    rows, double = gate_up.shape
    out = gate_up.new_empty(rows, double // 2)
    _entry_silu()(
        _is_half(gate_up), out.data_ptr(), gate_up.data_ptr(), rows, double // 2,
        _address(pending), _stream(),
    )  # fmt: skip
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
    pending: Pending | None = None,
) -> torch.Tensor:
    """The queries, rotated; keys and values stored."""
    num_kv_heads, head_dim = keys.shape[-2:]
    num_tokens = len(qkv)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    query = qkv.new_empty(num_tokens, num_heads, head_dim)
    _entry_rotary()(
        _is_half(qkv), query.data_ptr(), qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        keys.data_ptr(), values.data_ptr(), locations.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        num_tokens, num_heads, num_kv_heads, head_dim, cos.shape[1], eps, _address(pending),
        _stream(),
    )  # fmt: skip
    return query


def _is_served(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _address(pending: Pending | None) -> Any:
    return None if pending is None else byref(pending_arguments(*pending))


def _is_half(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return int(tensor.dtype == torch.float16)


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


_PENDING = POINTER(PendingArguments)


@cache
def _entry_norm() -> Callable[..., None]:
    return bind(
        "lorafleet_rms_norm", c_int, *[c_void_p] * 4, c_int, c_int, c_float, _PENDING, c_void_p
    )


@cache
def _entry_silu() -> Callable[..., None]:
    return bind("lorafleet_silu_mul", c_int, c_void_p, c_void_p, c_int, c_int, _PENDING, c_void_p)


@cache
def _entry_rotary() -> Callable[..., None]:
    return bind(
        "lorafleet_rotary_and_store",
        c_int,
        *[c_void_p] * 9,
        *[c_int] * 5,
        c_float,
        _PENDING,
        c_void_p,
    )
