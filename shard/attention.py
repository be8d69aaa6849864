"""Attention over paged keys and values, plugged into transformers' attention interface.

A step's rows are cut once, not per layer, into a decode part (one token a row, computed together)
and prefill spans (several tokens, computed row by row). This module is the plain-torch form; it
runs on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.kv_pool import KvPool

NAME = "lorafleet_paged"


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Tokens [start, stop) of the step: positions [first, first + stop - start) of one row."""

    start: int
    stop: int
    first: int
    pages: torch.Tensor  # [n] int64, covering every position up to the last


class AttentionKind(NamedTuple):
    """What layers may differ in; each kind is planned by itself.

    window: keys a token sees, its own included; None for all. softcap: of the scores.
    """

    scaling: float
    window: int | None
    softcap: float | None


def attention_kind(module: Any) -> AttentionKind:
    """How a transformers attention module calls the interface."""
    if hasattr(module, "sliding_window"):  # families whose layers differ
        window = module.sliding_window
    else:
        window = getattr(module.config, "sliding_window", None)
    return AttentionKind(module.scaling, window, getattr(module, "attn_logit_softcapping", None))


class PagedBatch(Protocol):
    """Where a step's keys and values go, and attention over them."""

    @property
    def pool(self) -> KvPool:
        """The pages."""

    @property
    def locations(self) -> torch.Tensor:
        """[num_tokens] int64, where each token's key and value go in the pool."""

    def attend(self, layer: int, query: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
        """Causal attention of [num_tokens, heads, head_dim] over stored keys and values."""


@dataclass(slots=True)
class AttentionBatch:
    """What attention needs of a step; built once, read by every layer.

    locations: [num_tokens] int64, where each token's key and value go in the pool.
    spans: the prefill rows. Decode rows are the tokens from `decode_start` on.
    decode_pages: [num_decodes, n] int64; decode_lengths: [num_decodes] int64, keys per row.
    """

    pool: KvPool
    locations: torch.Tensor
    spans: list[PrefillSpan]
    decode_start: int
    decode_pages: torch.Tensor
    decode_lengths: torch.Tensor
    decode_foreign: torch.Tensor | None = None  # see `_foreign`; made once for all layers
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
        """Causal attention of [num_tokens, heads, head_dim] queries over their rows' pages.

        Token i of a row sees keys j with i - kind.window < j <= i. What lies in its pages behind
        its own keys is another's, and may be no number, which no weight of 0 would keep out.
        """
        scaling, window, softcap = kind
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for index, span in enumerate(self.spans):
            keys, values = self.pool.read(layer, span.pages)
            num_own = span.first + span.stop - span.start
            keys[num_own:], values[num_own:] = 0, 0
            mask = self.span_mask(index, window, query.dtype)
            tokens = query[span.start : span.stop].transpose(0, 1)
            attended = _attend_span(tokens, keys, values, mask, scaling, softcap)
            output[span.start : span.stop] = attended
        if self.decode_start < output.shape[0]:
            keys, values = self.pool.read(layer, self.decode_pages)
            for read in (keys, values):
                read.flatten(0, 1).index_fill_(0, self._foreign(), 0)
            mask = self.decode_mask(window, query.dtype)
            tokens = query[self.decode_start :]
            output[self.decode_start :] = _attend_rows(tokens, keys, values, mask, scaling, softcap)
        return output

    def _foreign(self) -> torch.Tensor:
        """Which of [num_decodes * keys] lie behind their row's own: int64.

        Indices, since `masked_fill_` takes four times as long as `index_fill_` on a CPU.
        """
        if self.decode_foreign is None:
            positions = torch.arange(_num_keys(self.decode_pages), device=self.locations.device)
            is_foreign = positions >= self.decode_lengths.unsqueeze(1)
            self.decode_foreign = is_foreign.flatten().nonzero().squeeze(1)
        return self.decode_foreign

    def span_mask(self, index: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [tokens, keys] of a prefill span, made once for all layers."""
        key = (index, window)
        if key not in self.masks:
            span = self.spans[index]
            device = self.locations.device
            positions = torch.arange(span.first, span.first + span.stop - span.start, device=device)
            self.masks[key] = _mask(positions.unsqueeze(1), _num_keys(span.pages), window, dtype)
        return self.masks[key]

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [num_decodes, 1, 1, keys], made once for all layers."""
        key = (-1, window)
        if key not in self.masks:
            positions = (self.decode_lengths - 1).view(-1, 1, 1, 1)
            self.masks[key] = _mask(positions, _num_keys(self.decode_pages), window, dtype)
        return self.masks[key]


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    paged: PagedBatch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: what the step's batch makes of a layer's tokens.

    query: [1, heads, num_tokens, head_dim]; key, value: [1, kv_heads, num_tokens, head_dim], stored
    before anything is read. Returns [1, num_tokens, heads, head_dim].
    """
    layer = module.layer_idx
    paged.pool.write(layer, paged.locations, key[0].transpose(0, 1), value[0].transpose(0, 1))
    rows = query[0].transpose(0, 1)
    kind = AttentionKind(scaling, sliding_window, softcap)
    return paged.attend(layer, rows, kind).unsqueeze(0), None


def _attend_span(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """query [heads, t, d], keys and values [k, kv_heads, d] -> [t, heads, d]."""
    num_kv_heads = keys.shape[1]
    grouped = query.unflatten(0, (num_kv_heads, -1))  # [kv_heads, heads per kv head, t, d]
    group = grouped.shape[1]
    keys = keys.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    values = values.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    return _attend(grouped, keys, values, mask, scaling, softcap).flatten(0, 1).transpose(0, 1)


def _attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """query [rows, heads, d], keys and values [rows, k, kv_heads, d] -> [rows, heads, d].

    A row's heads of one key/value head take the place of query tokens, so keys are not repeated.
    """
    num_kv_heads = keys.shape[2]
    grouped = query.unflatten(1, (num_kv_heads, -1))  # [rows, kv_heads, heads per kv head, d]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    return _attend(grouped, keys, values, mask, scaling, softcap).flatten(1, 2)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scaling / softcap)) * softcap + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values


def _mask(
    positions: torch.Tensor, num_keys: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """0 where the token at a position sees a key, -inf where it does not."""
    keys = torch.arange(num_keys, device=positions.device)
    seen = keys <= positions
    if window is not None:
        seen &= keys > positions - window
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def _num_keys(pages: torch.Tensor) -> int:
    return pages.shape[-1] * PAGE_SIZE


def _no_mask(*_: Any, **__: Any) -> None:
    """Stands for transformers' mask maker: the paged batch brings its own masks."""


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, _no_mask)
