"""linear for a few rows on CUDA: the weight streams through once. See skinny.cu.

cuBLAS reads large weights at the speed of memory, but those of q/k/v, o and down at two thirds of
it; this kernel comes nearer, as long as x is small beside the weight. It can carry the LoRA shrink
of the same x, which then costs no launch.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from functools import cache

import torch

from lorafleet.kernels.build import bind

MAX_ROWS = 32
_BEST_ROWS = 8
# Where it beats cuBLAS on an H200: docs/benchmarks.md.
_MAX_OUTS = 32768


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel can serve this product."""
    return (
        x.is_cuda
        and 1 <= len(x) <= MAX_ROWS
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[1] % 8 == 0
    )


def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether it is the faster way."""
    return len(x) <= _BEST_ROWS and weight.shape[0] <= _MAX_OUTS and supports(x, weight)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shrink: tuple[int | None, ...] = (None, None, None, 0, None, 0, 0),
) -> torch.Tensor:
    """x [rows, in] @ weight [out, in]^T + bias.

    `shrink`: partial sums, arena, table, the table's row stride, row_slots, capacity and splits of
    `lora.cuda.shrink`, tensors as addresses; the partial sums are written by the same launch.
    """
    outs, wide = weight.shape
    y = x.new_empty(len(x), outs)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    _entry()(
        int(x.dtype == torch.float16), y.data_ptr(), x.data_ptr(), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), len(x), outs, wide, *shrink,
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    return y


@cache
def _entry() -> Callable[..., None]:
    return bind(
        "lorafleet_skinny_linear", c_int, *[c_void_p] * 4, *[c_int] * 3, *[c_void_p] * 3, c_int64,
        c_void_p, c_int, c_int, c_void_p,
    )  # fmt: skip
