"""RowTable: what a shard remembers of the sequences that hold its rows."""

from __future__ import annotations

import torch

from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.transfers import to_device


class RowTable:
    """Tokens, pages and sampling parameters by row; owned by the compute thread.

    tokens: [max_rows + 1, max_len + 1] int64 on the device. A step reads its inputs here and writes
    what it samples here, so generated tokens never travel to come back. The last row, here and in
    the page table, belongs to the padding of captured steps.
    page_table: [max_rows + 1, max_pages] int64 on the device.
    """

    def __init__(self, max_rows: int, max_len: int, device: torch.device) -> None:
        self.device, self.max_rows = device, max_rows
        self.tokens = torch.zeros(max_rows + 1, max_len + 1, dtype=torch.int64, device=device)
        max_pages = -(-max_len // PAGE_SIZE)
        self.page_table = torch.zeros(max_rows + 1, max_pages, dtype=torch.int64, device=device)
        self._host_pages = torch.zeros(max_rows, max_pages, dtype=torch.int32)
        self.sampling = [SamplingParams()] * max_rows
        self.num_prompt_tokens = [0] * max_rows
        self._num_pages = [0] * max_rows

    def begin(self, start: SequenceStart) -> None:
        """Gives a row to a sequence; whatever held it is forgotten."""
        row = start.row
        self.sampling[row] = start.sampling
        self.num_prompt_tokens[row] = start.num_prompt_tokens
        self._num_pages[row] = 0
        ids = torch.tensor(start.token_ids, dtype=torch.int64)
        self.tokens[row, : len(ids)] = to_device(ids, self.device)

    def append_pages(self, plan: StepPlan) -> None:
        """Extends the rows' page tables by the pages the plan brings."""
        rows: list[int] = []
        columns: list[int] = []
        for row, count in zip(plan.rows, plan.new_page_counts, strict=True):
            if count:
                held = self._num_pages[row]
                rows += [row] * count
                columns += range(held, held + count)
                self._num_pages[row] = held + count
        if rows:
            host = torch.tensor([rows, columns, plan.pages])
            self._host_pages[host[0], host[1]] = host[2].int()
            index = to_device(host, self.device)
            self.page_table[index[0], index[1]] = index[2]

    def locations(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where in the KV pool a position of each row lies: page * page_size + offset; int64."""
        pages = self._host_pages[rows, positions // PAGE_SIZE].long()
        return pages * PAGE_SIZE + positions % PAGE_SIZE

    def pages(self, row: int, length: int) -> torch.Tensor:
        """The pages of a row's first `length` tokens: int32 on the host, a view."""
        return self._host_pages[row, : self.pages_for(length)]

    def pages_for(self, length: int) -> int:
        """Pages that hold `length` tokens."""
        return -(-length // PAGE_SIZE)
