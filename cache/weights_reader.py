"""WeightsReader: tensors of an adapter's weights file, one at a time, with plain reads."""

from __future__ import annotations

import os
from typing import Self

import torch

from lorafleet.cache.adapter_files import WEIGHTS_FILE, AdapterSpec, unreadable
from lorafleet.cache.errors import SourceUnavailable
from lorafleet.cache.safetensors_file import TensorCut, TensorRef

_TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_MAX_CUT = 4  # A and B of gate_up and of down: a layer of experts


class WeightsReader:
    """Opened by `with`; raises AdapterUnservable or SourceUnavailable for what reading meets."""

    def __init__(self, spec: AdapterSpec) -> None:
        self._path = spec.directory / WEIGHTS_FILE
        self._cut: dict[str, torch.Tensor] = {}  # tensors that parts were read of, the last few
        self._read: set[TensorRef] = set()
        self.done = 0  # bytes of the tensors read, each counted once

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, ref: TensorRef) -> torch.Tensor:
        """A tensor, or part of one, in the file's own dtype."""
        if isinstance(ref, TensorCut):
            return self._whole(ref.whole).view(ref.view)[ref.index]
        data, done = memoryview(bytearray(ref.nbytes)), 0
        try:
            while done < ref.nbytes:
                count = os.preadv(self._fd, [data[done:]], ref.offset + done)
                if count == 0:
                    raise SourceUnavailable(f"{self._path.name} shrank while it was read.")
                done += count
        except OSError as error:
            raise unreadable(error) from None
        if ref not in self._read:
            self._read.add(ref)
            self.done += ref.nbytes
        return torch.frombuffer(data, dtype=_TORCH_DTYPES[ref.dtype]).view(ref.shape)

    def _whole(self, ref: TensorRef) -> torch.Tensor:
        """A tensor of which more parts will be asked for soon."""
        if ref.name not in self._cut:
            if len(self._cut) >= _MAX_CUT:
                self._cut.clear()
            self._cut[ref.name] = self.read(ref)
        return self._cut[ref.name]
