"""WeightsReader: an adapter's tensors out of its files, one at a time."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch

from lorafleet.cache.adapter_files import unreadable
from lorafleet.cache.errors import SourceUnavailable
from lorafleet.cache.pickled_file import load_pickled
from lorafleet.cache.safetensors_file import TensorCut, TensorRef
from lorafleet.cache.weight_files import PICKLE_FILES

_TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_MAX_CUT = 6  # A and B of gate, of up and of down: a layer of experts


class WeightsReader:
    """Reads with plain reads, file by file as they are asked for. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self.done = 0  # bytes of the tensors read, each counted once
        self._directory = directory
        self._stack = ExitStack()
        self._files: dict[str, int] = {}  # descriptors by name
        self._pickled: dict[str, torch.Tensor] | None = None
        self._read: set[TensorRef] = set()
        self._cut: dict[str, torch.Tensor] = {}  # tensors that parts were read of, the last few

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, ref: TensorRef) -> torch.Tensor:
        """A tensor, or part of one, in the file's own dtype.

        Raises SourceUnavailable when the file is not what it was, AdapterUnservable when it cannot
        be read.
        """
        if isinstance(ref, TensorCut):
            return self._whole(ref.whole).view(ref.view)[ref.index]
        try:
            is_pickled = ref.file in PICKLE_FILES
            tensor = self._unpickled(ref) if is_pickled else self._plain(ref)
        except OSError as error:
            raise unreadable(error) from None
        if ref not in self._read:
            self._read.add(ref)
            self.done += ref.nbytes
        return tensor

    def _whole(self, ref: TensorRef) -> torch.Tensor:
        """A tensor of which more parts will be asked for soon."""
        if ref.name not in self._cut:
            if len(self._cut) >= _MAX_CUT:
                self._cut.clear()
            self._cut[ref.name] = self.read(ref)
        return self._cut[ref.name]

    def _plain(self, ref: TensorRef) -> torch.Tensor:
        if ref.file not in self._files:
            descriptor = os.open(self._directory / ref.file, os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            self._files[ref.file] = descriptor
        data = torch.empty(ref.nbytes, dtype=torch.uint8)  # not zeroed first, as a bytearray is
        view, done = data.numpy().data, 0
        while done < ref.nbytes:
            count = os.preadv(self._files[ref.file], [view[done:]], ref.offset + done)
            if count == 0:
                raise SourceUnavailable(f"{ref.file} shrank while it was read.")
            done += count
        return data.view(_TORCH_DTYPES[ref.dtype]).view(ref.shape)

    def _unpickled(self, ref: TensorRef) -> torch.Tensor:
        if self._pickled is None:
            self._pickled = load_pickled(self._directory / ref.file)
        tensor = self._pickled.get(ref.name)
        if tensor is None or (tensor.shape, tensor.dtype) != (ref.shape, _TORCH_DTYPES[ref.dtype]):
            raise SourceUnavailable(f"{ref.file} changed while it was read; try again.")
        return tensor.contiguous()
