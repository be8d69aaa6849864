"""Host memory for packed adapters: exact sizes, and page-locked for a CUDA device's copies.

torch's own pinned allocator rounds sizes up to powers of two and keeps what is freed, which would
make a byte budget a wish. Here a buffer has its own pages and gives them back.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import torch

from lorafleet.cache.errors import TierFull
from lorafleet.cache.packed_form import PackedForm
from lorafleet.cache.packing import PackedAdapter

_HUGE_PAGE = 2 << 20  # bytes


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
    _ask_for_huge_pages(pages, packed)
    if pin:
        _pin(packed)
    return packed


def _ask_for_huge_pages(pages: mmap.mmap, packed: PackedAdapter) -> None:
    """Linux makes the same memory of huge pages in a fifth of the time; CUDA has fewer to lock.

    Only where they are this buffer's alone: of one that two share, no part would be given back.
    """
    first = -packed.buffer.data_ptr() % _HUGE_PAGE
    length = (packed.nbytes - first) // _HUGE_PAGE * _HUGE_PAGE
    if length > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE, first, length)


def _pin(packed: PackedAdapter) -> None:
    cudart = torch.cuda.cudart()
    address = packed.buffer.data_ptr()
    if int(cudart.cudaHostRegister(address, packed.nbytes, 0)) != 0:
        raise TierFull("The machine cannot page-lock host memory for the adapter.")
    unpin = weakref.finalize(packed, cudart.cudaHostUnregister, address)
    unpin.atexit = False  # the process's end does it
