"""WeightsReader: tensors of an adapter's weights file, one at a time, with plain reads."""

from __future__ import annotations

import os
from typing import Self

import torch

from lorafleet.cache.adapter_files import WEIGHTS_FILE, AdapterSpec, unreadable
from lorafleet.cache.errors import SourceUnavailable
from lorafleet.cache.safetensors_file import TensorRef

_TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


class WeightsReader:
    """Opened by `with`; raises AdapterUnservable or SourceUnavailable for what reading meets."""

    def __init__(self, spec: AdapterSpec) -> None:
        self._path = spec.directory / WEIGHTS_FILE

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, ref: TensorRef) -> torch.Tensor:
        """A tensor in the file's own dtype and shape."""
        data, done = memoryview(bytearray(ref.nbytes)), 0
        try:
            while done < ref.nbytes:
                count = os.preadv(self._fd, [data[done:]], ref.offset + done)
                if count == 0:
                    raise SourceUnavailable(f"{self._path.name} shrank while it was read.")
                done += count
        except OSError as error:
            raise unreadable(error) from None
        return torch.frombuffer(data, dtype=_TORCH_DTYPES[ref.dtype]).view(ref.shape)
