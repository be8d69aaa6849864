"""fetch_: copies a few kilobytes of page-locked host memory to the device, in stream order.

Semantics:
    to[...] = source[...]

A kernel reads the host's memory itself. The copy engine takes its copies one after another, so that
a small one queued there would wait for an adapter of a hundred megabytes in front of it.

Arguments:
    to      on a CUDA device, contiguous, 16-byte aligned.
    source  as `to`, page-locked; must keep its values until the device has come so far.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache

import torch

from lorafleet.kernels.build import bind


def fetch_(to: torch.Tensor, source: torch.Tensor) -> None:
    """See the module's docstring."""
    assert to.is_cuda
    assert source.is_pinned()
    assert to.is_contiguous()
    assert source.is_contiguous()
    assert to.dtype == source.dtype
    assert to.shape == source.shape
    _entry()(to.data_ptr(), source.data_ptr(), to.nbytes, torch.cuda.current_stream().cuda_stream)


@cache
def _entry() -> Callable[..., None]:
    return bind("lorafleet_fetch", c_void_p, c_void_p, c_int64, c_void_p)
