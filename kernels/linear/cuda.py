"""linear for a decode step's rows on Hopper: the weight streams through once. See stream.cu.

The kernel asks for its weight before the kernel in front of it has ended, so that in a line of
launches the memory never rests; cuBLAS begins each product anew.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, byref, c_int, c_void_p, cast, pointer
from functools import cache

import torch

from lorafleet.kernels.build import bind
from lorafleet.kernels.device import shared_bytes

MAX_ROWS = 64
_TILE_ROWS = 128  # of the weight, as stream.cu cuts it
_MAX_OUTS, _MAX_WIDE = 1 << 20, 1 << 16  # so that the kernel can count in 32 bits
_BLOCK_BYTES = 120 << 10  # of shared memory


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel can serve this product."""
    outs, wide = weight.shape
    return (
        x.is_cuda
        and 1 <= len(x) <= MAX_ROWS
        and x.dtype in (torch.float16, torch.bfloat16)
        and wide % 8 == 0
        and wide <= _MAX_WIDE
        and outs % 8 == 0
        and outs <= _MAX_OUTS
        and is_hopper(x.device)
        and shared_bytes(x.device) >= _BLOCK_BYTES
    )


def supports_gated(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether it can also multiply the halves of the outputs as gate and up."""
    return supports(x, weight) and len(weight) % 16 == 0


def is_hopper(device: torch.device) -> bool:
    """Whether the device has a copy engine and clusters of blocks."""
    return _device(device).major >= 9


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shrink: Structure | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """x [rows, in] @ weight [out, in]^T + bias, for what `supports`; launches must not overlap.

    `shrink`: what some warps compute of the same x, as lora.cuda describes it to the kernel.
    `is_gated`: silu of the first half of the outputs times the second, for what `supports_gated`;
    with `shrink`, after the whole update has been added to both.
    """
    outs, wide = weight.shape
    assert x.is_contiguous()
    assert weight.is_contiguous()
    y = x.new_empty(len(x), outs // 2 if is_gated else outs)
    # Each block leaves at most two parts of tiles to others; rows come in 16, 32 or 64.
    rows = max(16, 1 << (len(x) - 1).bit_length())
    num_blocks = _device(x.device).multi_processor_count
    partial = x.new_empty(2 * num_blocks, _TILE_ROWS * rows, dtype=torch.float32)
    given = _Arguments(
        y.data_ptr(), x.data_ptr(), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), len(x), outs, wide, is_gated,
        partial.data_ptr(), _counters(x.device).data_ptr(),
        None if shrink is None else cast(pointer(shrink), c_void_p),
    )  # fmt: skip
    is_half = int(x.dtype == torch.float16)
    _entry()(is_half, byref(given), torch.cuda.current_stream().cuda_stream)
    return y


class _Arguments(Structure):
    """`Arguments` of stream.cu."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int),
        ("outs", c_int),
        ("wide", c_int),
        ("is_gated", c_int),
        ("partial", c_void_p),
        ("counters", c_void_p),
        ("shrink", c_void_p),
    )


@cache
def _device(device: torch.device) -> torch._C._CudaDeviceProperties:
    return torch.cuda.get_device_properties(device)


@cache
def _counters(device: torch.device) -> torch.Tensor:
    """An update's two and the tiles', zero between launches."""
    return torch.zeros(2 + _MAX_OUTS // _TILE_ROWS, dtype=torch.int32, device=device)


@cache
def _entry() -> Callable[..., None]:
    return bind("lorafleet_stream_linear", c_int, c_void_p, c_void_p)
