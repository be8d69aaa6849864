"""BaseTables: what the base model's checkpoint has of the vocabulary, to be compared with.

peft saves a whole embedding beside an adapter's LoRA on it, and both tables after a resize, even
where nothing in them was trained. Rows that are the base's need no room of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_CHUNK_ROWS = 16_384


class BaseTables:
    """Reads the base's tables anew for each comparison; nothing of them is kept."""

    def __init__(
        self, rows: Callable[[str, int, int], torch.Tensor], size: int, dtype: torch.dtype
    ) -> None:
        """`rows(module, start, stop)`: of the `size` rows of a table; `dtype`: as it is served."""
        self._rows, self._size, self._dtype = rows, size, dtype

    def differing(self, module: str, table: torch.Tensor) -> list[int]:
        """Of the base's tokens those whose row in `table` would be served as another one."""
        found: list[int] = []
        for start in range(0, self._size, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, self._size)
            mine = table[start:stop].to(self._dtype)
            base = self._rows(module, start, stop).to(self._dtype)
            differs = (mine != base).any(dim=1)
            found += (differs.nonzero().flatten() + start).tolist()
        return found
