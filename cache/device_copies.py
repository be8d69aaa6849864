"""How bytes get from host memory into the arena while the compute goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

# (destination, source): contiguous tensors of one dtype and size.
Copies = list[tuple[torch.Tensor, torch.Tensor]]

_PIECE = 2 << 20  # elements: 4 MiB in the usual dtypes, 0.1 ms of a bus


class Copy(Protocol):
    """Copies under way."""

    def wait(self) -> None:
        """Makes what the caller computes next come after them. Raises what went wrong, if known."""

    def is_done(self) -> bool:
        """Whether they have finished. Raises what went wrong."""


class Copier(Protocol):
    """Starts copies, one after the other, beside the compute."""

    def start(self, copies: Copies) -> Copy:
        """Begins them once what the caller has computed or queued so far is done."""


def copier_for(device: torch.device) -> Copier:
    """The way of this kind of device."""
    return _StreamCopier(device) if device.type == "cuda" else _ThreadCopier()


class _ThreadCopier:
    """CPU: one thread. The caller computes synchronously, so nothing of its past is pending."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-copies")

    def start(self, copies: Copies) -> Copy:
        return _ThreadCopy(self._thread.submit(_copy_all, copies))


class _ThreadCopy:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    def is_done(self) -> bool:
        if self._future.done():
            self._future.result()
            return True
        return False


def _copy_all(copies: Copies) -> None:
    for destination, source in copies:
        # By numpy, on this thread alone. torch would start OpenMP threads for it, and with more of
        # them than cores libgomp puts the compute's threads to sleep between operations.
        _bytes(destination)[...] = _bytes(source)


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The tensor's memory."""
    memory: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return memory


class _StreamCopier:
    """CUDA: a side stream, ordered by events alone; the host never waits.

    Sources are page-locked and outlive the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, copies: Copies) -> Copy:
        # What the compute stream has queued may still read the bytes that are overwritten.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for destination, source in copies:
                # In pieces, between which the copy engine turns to other streams' small copies.
                pieces = zip(destination.split(_PIECE), source.split(_PIECE), strict=True)
                for to, piece in pieces:
                    to.copy_(piece, non_blocking=True)
            return _StreamCopy(self._stream.record_event(), self._stream.device)


class _StreamCopy:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def is_done(self) -> bool:
        return bool(self._event.query())
