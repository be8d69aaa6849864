"""Host memory for packed adapters: exact sizes, and page-locked for a CUDA device's copies.

torch's own pinned allocator rounds sizes up to powers of two and keeps what is freed, which would
make a byte budget a wish. Here a buffer has its own pages and gives them back.
"""

from __future__ import annotations

import mmap
import weakref

import torch

from lorafleet.cache.errors import TierFull
from lorafleet.cache.packed_form import PackedForm
from lorafleet.cache.packing import PackedAdapter


def allocate(form: PackedForm, dtype: torch.dtype, pin: bool) -> PackedAdapter:
    """An empty (all zero) packed adapter; with `pin`, copies from it to CUDA are asynchronous.

    The pages are returned when the PackedAdapter is no longer referenced: who copies from the
    buffer holds on to the PackedAdapter until the copy is done. Raises TierFull when the machine
    has no memory for it.
    """
    try:
        pages = mmap.mmap(-1, form.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise TierFull("The machine has no host memory left for the adapter.") from None
    packed = PackedAdapter(form, torch.frombuffer(pages, dtype=dtype))
    if pin:
        _pin(packed)
    return packed


def _pin(packed: PackedAdapter) -> None:
    cudart = torch.cuda.cudart()
    address = packed.buffer.data_ptr()
    if int(cudart.cudaHostRegister(address, packed.nbytes, 0)) != 0:
        raise TierFull("The machine cannot page-lock host memory for the adapter.")
    unpin = weakref.finalize(packed, cudart.cudaHostUnregister, address)
    unpin.atexit = False  # the process's end does it
