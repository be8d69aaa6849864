"""lora_add_ in float32 from arena, table and row_slots alone: the oracle of every other form."""

from __future__ import annotations

import torch

from lorafleet.kernels.lora.weights import SiteWeights


def lora_reference(
    y: torch.Tensor, x: torch.Tensor, site: SiteWeights, row_slots: torch.Tensor
) -> torch.Tensor:
    """float32 [num_tokens, sum(out_splits)]: y[t, range_i] + (x[t] @ A_i^T) @ B_i of t's slot.

    x @ A^T is rounded to x's dtype, as lora_add_ does.
    """
    result = y.float().clone()
    for token, slot in enumerate(row_slots.tolist()):
        a_offset, _, *pairs = site.table[slot].tolist()
        out_start = 0
        for width, rank, b_offset in zip(site.out_splits, pairs[::2], pairs[1::2], strict=False):
            a = _block(site.arena, a_offset, rank, site.in_features)
            b = _block(site.arena, b_offset, rank, width)
            h = (x[token].float() @ a.T).to(x.dtype).float()
            result[token, out_start : out_start + width] += h @ b
            a_offset += rank * site.in_features
            out_start += width
    return result


def _block(arena: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
    return arena[offset : offset + rows * columns].view(rows, columns).float()
