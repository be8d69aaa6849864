"""greedy: the likeliest token of every row of logits, and its log-probability, in one pass.

Semantics:
    tokens[i] = the first argmax of logits[i]; -1 where the row is not finite
    logprobs[i] = logits[i, tokens[i]] - log(sum(exp(logits[i]))), in float32
    table[places[i]] = tokens[i], or 0 for -1

Arguments:
    logits   [rows, vocab], fp16 or bf16 on a CUDA device, contiguous.
    arrived  int32 [at least rows], zero; the kernel leaves it zero. Launches that may overlap need
             one each.
    table    int64, 1-D, contiguous. places int64 [rows], contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_void_p
from functools import cache

import torch

from lorafleet.kernels.build import bind

_CHUNK = 16384  # logits of one block
_PARTIAL_BYTES = 12


def greedy(
    logits: torch.Tensor, arrived: torch.Tensor, table: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the module's docstring; tokens int64 [rows], logprobs float32 [rows]."""
    rows, vocab = logits.shape
    assert logits.is_contiguous()
    tokens = logits.new_empty(rows, dtype=torch.int64)
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    size = rows * -(-vocab // _CHUNK) * _PARTIAL_BYTES
    partial = logits.new_empty(size, dtype=torch.uint8)
    _entry()(
        int(logits.dtype == torch.float16), tokens.data_ptr(), logprobs.data_ptr(),
        partial.data_ptr(), arrived.data_ptr(), logits.data_ptr(), rows, vocab,
        table.data_ptr(), places.data_ptr(), torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    return tokens, logprobs


@cache
def _entry() -> Callable[..., None]:
    return bind("lorafleet_greedy", c_int, *[c_void_p] * 5, c_int, c_int, *[c_void_p] * 3)
