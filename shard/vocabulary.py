"""The vocabulary's two ends, parallel over it: the embedding and the output layer.

Both act on tables with a row for each token, and an adapter may change them for its rows of a
batch; `cache.vocabulary_parts` says how, and in which order a rank holds the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from lorafleet.cache.vocabulary_config import EMBEDDING, HEAD
from lorafleet.cache.vocabulary_parts import DIGIT_BASE
from lorafleet.kernels.linear.op import linear, prepack
from lorafleet.shard.group import Group
from lorafleet.shard.layers import LoraState, SlotParts


class _Change(NamedTuple):
    """One adapter's parts of one table, on the device; see `cache.vocabulary_parts`."""

    table: torch.Tensor | None  # [rows, hidden], in place of the base's
    added_rows: torch.Tensor | None  # [n, hidden]
    token_index: torch.Tensor | None  # [n, 3]
    token_rows: torch.Tensor | None  # [n, hidden]
    lora_rows: torch.Tensor | None  # [rows, r]
    lora_basis: torch.Tensor | None  # [r, hidden]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], module: str) -> Self | None:
        """A module's parts, None when the adapter leaves it as it is."""
        names = ("weight", "added_rows", "token_index", "token_rows", "lora_rows", "lora_basis")
        found = [tensors.get(f"{module}.{name}") for name in names]
        return None if all(part is None for part in found) else cls(*found)

    def tokens(self) -> torch.Tensor:
        """[n] int64: the rows that are replaced by `token_rows`, sorted."""
        assert self.token_index is not None
        return _from_digits(self.token_index)


class _Run(NamedTuple):
    """A run of rows whose adapter changes a table."""

    change: _Change
    rows: slice


def _runs(parts: Sequence[SlotParts], module: str) -> list[_Run]:
    return [
        _Run(change, slice(start, stop))
        for tensors, start, stop in parts
        if (change := _Change.of(tensors, module)) is not None
    ]


def _from_digits(found: torch.Tensor) -> torch.Tensor:
    number = torch.zeros_like(found[:, 0], dtype=torch.int64)
    for place in reversed(range(found.shape[1])):
        number = number * DIGIT_BASE + found[:, place].long()
    return number


class VocabEmbedding(nn.Module):
    """A vocabulary-parallel embedding: each rank looks up its entries, the ranks' results sum.

    Wraps the model's own embedding module, which keeps what it does besides the lookup (some
    scale); of the base's rows only one rank's term is non-zero, so their sum is exact.
    """

    def __init__(self, lookup: nn.Embedding, start: int, size: int, group: Group) -> None:
        """`lookup` holds the entries from `start` on, of `size` on all ranks."""
        super().__init__()
        self.lookup = lookup
        self._start, self._size, self._group = start, size, group
        self._lora: LoraState | None = None

    def attach(self, state: LoraState) -> None:
        """Gives the embedding the step's rows."""
        self._lora = state

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[1, num_tokens] ids -> [1, num_tokens, hidden]."""
        runs = [] if self._lora is None else _runs(self._lora.parts, EMBEDDING)
        if self._group.size == 1 and not runs:
            return self.lookup(ids)  # type: ignore[no-any-return]
        local = ids - self._start
        here = (local >= 0) & (local < self.lookup.weight.shape[0])
        rows: torch.Tensor = self.lookup(local.masked_fill(~here, 0))
        rows.masked_fill_(~here.unsqueeze(-1), 0)
        for change, tokens in runs:
            self._change(rows[0, tokens], ids[0, tokens], change)
        return self._group.all_reduce_(rows)

    def _change(self, rows: torch.Tensor, ids: torch.Tensor, change: _Change) -> None:
        """Makes `rows` what this rank has of the adapter's embeddings of `ids`."""
        index, here = self._index(ids)
        if change.table is not None:
            rows.copy_(self._scaled(_picked(change.table, index, here)))
        if change.added_rows is not None:
            added = index - self.lookup.weight.shape[0]
            rows.add_(self._scaled(_picked(change.added_rows, added, here & (added >= 0))))
        if change.token_rows is not None:
            tokens = change.tokens()
            place = torch.searchsorted(tokens, index).clamp_(max=max(len(tokens) - 1, 0))
            if len(tokens):
                hit = ((tokens[place] == index) & here).unsqueeze(-1)
                rows.copy_(torch.where(hit, self._scaled(change.token_rows[place]), rows))
        if change.lora_rows is not None:
            assert change.lora_basis is not None
            product = _picked(change.lora_rows, index, here) @ change.lora_basis
            rows.add_(self._scaled(product))

    def _index(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each token's row is in this rank's parts, and whether this rank adds it.

        All ranks hold the tokens that the base has not; the first one adds them.
        """
        num_base = self.lookup.weight.shape[0]
        local = ids - self._start
        is_new = ids >= self._size
        here = torch.where(is_new, self._group.rank == 0, (local >= 0) & (local < num_base))
        return torch.where(is_new, ids - self._size + num_base, local), here

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """What the model's own embedding module does to what it looked up."""
        scale = getattr(self.lookup, "embed_scale", None)
        return rows if scale is None else rows * scale


def _picked(table: torch.Tensor, index: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Rows `index` of a table, zeros where they are not here."""
    here = here & (index < table.shape[0])
    if not table.shape[0]:
        return table.new_zeros(len(index), table.shape[1])
    return table[index.masked_fill(~here, 0)].masked_fill_(~here.unsqueeze(-1), 0)


class VocabHead(nn.Module):
    """A vocabulary-parallel output layer: each rank computes its entries, then all get all."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, vocab_size: int, group: Group
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._num_base = weight.shape[0]
        self._vocab_size, self._group = vocab_size, group

    def prepack(self) -> None:
        """As a site's; an embedding that shares the weight keeps it as it was."""
        self.weight = nn.Parameter(prepack(self.weight), requires_grad=False)

    def forward(self, hidden: torch.Tensor, parts: Sequence[SlotParts] = ()) -> torch.Tensor:
        """[n, hidden] -> logits [n, vocab_size], the same bits on every rank.

        Where `parts` have tokens that the base has not, there are columns for them; a token that a
        row's adapter has no logit for is -inf.
        """
        local = linear(hidden, self.weight, self.bias)
        runs = _runs(parts, HEAD)
        num_new = max([self._num_new(part.tensors) for part in parts], default=0)
        new = local.new_full((len(local), num_new), -torch.inf)
        for change, rows in runs:
            self._change(hidden[rows], local[rows], new[rows], change)
        if not num_new:
            return self._gathered(local)
        # All ranks compute the added tokens; the first one's bits are everyone's.
        added = self._group.all_gather_columns(new)[:, :num_new]
        return torch.cat([self._gathered(local), added], dim=1)

    def _gathered(self, local: torch.Tensor) -> torch.Tensor:
        if self._group.size == 1:
            return local
        width = -(-self._vocab_size // self._group.size)
        padded = F.pad(local, (0, width - local.shape[1]))  # the last rank may have fewer
        return self._group.all_gather_columns(padded)[:, : self._vocab_size]

    def _num_new(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Tokens of an adapter that the base has not, in prompts or out."""
        found = [0]
        for module in (EMBEDDING, HEAD):
            if (table := tensors.get(f"{module}.weight")) is not None:
                found.append(len(table) - self._num_base)
            if (added := tensors.get(f"{module}.added_rows")) is not None:
                found.append(len(added))
        return max(found)

    def _change(
        self, hidden: torch.Tensor, local: torch.Tensor, new: torch.Tensor, change: _Change
    ) -> None:
        """Makes the base's logits of a run those of its adapter; what the rank holds of them."""
        num_base = self._num_base
        logits = torch.cat([local, new], dim=1)
        if change.table is not None:
            logits.fill_(-torch.inf)
            logits[:, : len(change.table)] = F.linear(hidden, change.table)
        if change.added_rows is not None:
            stop = num_base + len(change.added_rows)
            logits[:, num_base:stop] = F.linear(hidden, change.added_rows)
        if change.token_rows is not None:
            logits[:, change.tokens()] = F.linear(hidden, change.token_rows)
        if change.lora_rows is not None:
            assert change.lora_basis is not None
            product = F.linear(F.linear(hidden, change.lora_basis), change.lora_rows)
            logits[:, : len(change.lora_rows)] += product
        local.copy_(logits[:, :num_base])
        new.copy_(logits[:, num_base:])
