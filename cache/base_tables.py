"""BaseTables: what the base model's checkpoint has of the vocabulary, to be compared with.

peft saves a whole embedding beside an adapter's LoRA on it, and both tables after a resize, even
where nothing in them was trained. Rows that are the base's need no room of their own.
"""

from __future__ import annotations

import torch

from lorafleet.cache.base_weights import BaseWeights
from lorafleet.cache.layout import VocabularyLayout
from lorafleet.cache.vocabulary_config import EMBEDDING

_CHUNK_ROWS = 16_384


class BaseTables:
    """Reads the base's tables anew for each comparison; nothing of them is kept."""

    def __init__(self, base: BaseWeights, vocabulary: VocabularyLayout, dtype: torch.dtype) -> None:
        """`dtype`: as the tables are served."""
        self._base, self._vocabulary, self._dtype = base, vocabulary, dtype

    def differing(self, module: str, table: torch.Tensor) -> list[int]:
        """Of the base's tokens those whose row in `table` would be served as another one."""
        found: list[int] = []
        size = self._vocabulary.size
        name = EMBEDDING if self._vocabulary.is_tied else module
        for start in range(0, size, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, size)
            mine = table[start:stop].to(self._dtype)
            base = self._base.rows(f"{name}.weight", [(start, stop)]).to(self._dtype)
            differs = (mine != base).any(dim=1)
            found += (differs.nonzero().flatten() + start).tolist()
        return found
