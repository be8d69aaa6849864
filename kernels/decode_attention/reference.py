"""decode_attention in plain torch, row by row, in float32."""

from __future__ import annotations

import torch


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """float32 [num_rows, heads, head_dim]."""
    page_size, kv_heads = keys.shape[1:3]
    group = query.shape[1] // kv_heads
    found = []
    for index, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        length = position + 1
        pages = page_table[row, : -(-length // page_size)]
        first = max(0, length - window) if window else 0
        k, v = (pool[pages].flatten(0, 1)[first:length].float() for pool in (keys, values))
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        scores = scale * (k @ query[index].float().unsqueeze(2)).squeeze(2)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        found.append((scores.softmax(-1).unsqueeze(1) @ v).squeeze(1))
    return torch.stack(found)
