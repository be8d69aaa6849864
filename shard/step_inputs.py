"""StepInputs: the buffers that the captured graphs of one size read, and what fills them."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from lorafleet.kernels.fetch.op import fetch_
from lorafleet.kernels.lora.cuda import tiles_of
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.token_step import TokenStep


class _Columns:
    """Views of one buffer, int64 but for slots and tiles: int32 [size] and [max_tiles, 3].

    source: a token in the flat token table; target: there, where a drawn one goes. fresh: the
    first position of a token's row that the step may write.
    """

    def __init__(self, buffer: torch.Tensor, widths: list[int], size: int, tiles: int) -> None:
        parts = [buffer[a:b] for a, b in pairwise(accumulate(widths, initial=0))]
        self.source, self.rows, self.positions, self.locations, self.fresh = parts[:5]
        self.drawn, self.target = parts[5:7]
        self.slots = parts[7].view(torch.int32)[:size]
        self.tiles = parts[8].view(torch.int32)[: 3 * tiles].view(-1, 3)


class StepInputs:
    """Belongs to the compute thread, which must not fill it before the last fill was copied."""

    def __init__(self, size: int, max_draws: int, max_tiles: int, device: torch.device) -> None:
        """`size` tokens, of which at most `max_draws` have successors; tiles for LoRA."""
        widths = [*[size] * 5, max_draws, max_draws, -(-size // 2), -(-3 * max_tiles // 2)]
        self._size = size
        self._staging = torch.zeros(sum(widths), dtype=torch.int64, pin_memory=True)
        self._buffer = torch.zeros(sum(widths), dtype=torch.int64, device=device)
        self._host = _Columns(self._staging, widths, size, max_tiles)
        self.columns = _Columns(self._buffer, widths, size, max_tiles)

    def fill(self, step: TokenStep, row_width: int, scratch_row: int, scratch_page: int) -> None:
        """Queues the copy of a step; what is left of the size is padding."""
        host, count, draws = self._host, len(step.rows), len(step.drawn)
        host.rows[:count], host.rows[count:] = step.rows, scratch_row
        host.positions[:count], host.positions[count:] = step.positions, 0
        host.locations[:count], host.locations[count:] = step.locations, scratch_page * PAGE_SIZE
        host.slots[:count], host.slots[count:] = step.slots, 0
        torch.add(host.positions, host.rows, alpha=row_width, out=host.source)
        host.drawn[:draws], host.drawn[draws:] = step.drawn, 0
        host.target[:draws] = host.source[step.drawn] + 1
        host.target[draws:] = scratch_row * row_width
        host.fresh.copy_(host.positions)
        if step.has_prompts:
            host.fresh.zero_()
        if step.prompts is not None:
            tiles = tiles_of(step.prompts.segments, self._size)
            host.tiles[: len(tiles)], host.tiles[len(tiles) :] = tiles, 0
        # Not by the copy engine, which may be busy with an adapter for longer than a step.
        fetch_(self._buffer, self._staging)
