"""The vocabulary's two ends, parallel over it: the embedding and the output layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lorafleet.kernels.linear.op import linear, prepack
from lorafleet.shard.group import Group


class VocabEmbedding(nn.Module):
    """A vocabulary-parallel embedding: each rank looks up its entries, the ranks' results sum.

    Wraps the model's own embedding module, which keeps what it does besides the lookup (Gemma
    scales); only one rank's term is non-zero, so the sum is exact.
    """

    def __init__(self, lookup: nn.Embedding, start: int, group: Group) -> None:
        super().__init__()
        self.lookup = lookup
        self._start, self._group = start, group

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[1, num_tokens] ids -> [1, num_tokens, hidden]."""
        if self._group.size == 1:
            return self.lookup(ids)  # type: ignore[no-any-return]
        local = ids - self._start
        here = (local >= 0) & (local < self.lookup.weight.shape[0])
        rows: torch.Tensor = self.lookup(local.masked_fill(~here, 0))
        return self._group.all_reduce_(rows.masked_fill_(~here.unsqueeze(-1), 0))


class VocabHead(nn.Module):
    """A vocabulary-parallel output layer: each rank computes its entries, then all get all."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, vocab_size: int, group: Group
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._vocab_size, self._group = vocab_size, group

    def prepack(self) -> None:
        """As a site's; an embedding that shares the weight keeps it as it was."""
        self.weight = nn.Parameter(prepack(self.weight), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> logits [n, vocab_size], the same bits on every rank."""
        local = linear(hidden, self.weight, self.bias)
        if self._group.size == 1:
            return local
        width = -(-self._vocab_size // self._group.size)
        padded = F.pad(local, (0, width - local.shape[1]))  # the last rank may have fewer
        return self._group.all_gather_columns(padded)[:, : self._vocab_size]
