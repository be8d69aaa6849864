"""linear: y = x @ weight^T + bias, with the weight in the layout its device multiplies fastest.

Arguments:
    x       [num_tokens, in], serving dtype.
    weight  [out, in], or what `prepack` made of it.
    bias    [out] or None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorafleet.kernels.linear import cuda

# Rows of x that oneDNN lays the weight out for: a decode step's; a prefill loses nothing by it.
_PACKED_FOR_ROWS = 16


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """The weight as `linear` reads it from now on; on CPU in oneDNN's blocked layout.

    With few rows that is three to four times as fast as the BLAS, with many twice.
    """
    if weight.device.type == "cpu" and _onednn_multiplies(weight.dtype):
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
            weight.contiguous(), _PACKED_FOR_ROWS
        )
        return packed
    return weight


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See the module's docstring; [num_tokens, out]."""
    if weight.is_mkldnn:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    if cuda.supports(x, weight):
        return cuda.linear(x, weight, bias)
    return F.linear(x, weight, bias)
