"""Group: the ranks that hold one model between them, and their collectives."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

# torch 2.13 renamed it and warns about the old name, the only one that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """This process's place in its tensor-parallel group. One rank alone needs no backend."""

    def __init__(self, rank: int, size: int, device: torch.device, init_method: str) -> None:
        """Joins the group; blocks until every rank has. NCCL on CUDA, gloo on CPU."""
        self.rank, self.size = rank, size
        if size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            if init_method.startswith("file://"):  # all on this machine: no other may connect
                os.environ.setdefault(f"{backend.upper()}_SOCKET_IFNAME", "lo")
            dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size)

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` over the ranks, in place; every rank ends with the same bits."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """Joins the ranks' columns: [n, c] on each rank -> [n, size * c]."""
        if self.size == 1:
            return x
        rows, columns = x.shape
        parts = x.new_empty(self.size * rows, columns)
        _all_gather(parts, x.contiguous())
        return parts.view(self.size, rows, columns).transpose(0, 1).reshape(rows, -1)

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
