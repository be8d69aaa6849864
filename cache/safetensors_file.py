"""The header of a safetensors file, read and checked without its data or any library.

Data are read later with plain reads, never mapped: a file that shrinks under a mapping kills the
process, a file that shrinks under a read is an error.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.strict_json import read_object

MAX_HEADER_BYTES = 16 << 20
_MAX_DIMENSIONS = 8
_LARGE_HEADER_BYTES = 1 << 20  # far more than any honest adapter's
# Parsed, a header takes twenty times its bytes: large ones are read one at a time, so that many at
# once take, and leave in pieces, no more memory than one.
_LARGE_HEADER = Lock()

_DTYPES_BY_BYTES = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64"),
}
_ITEM_BYTES = {dtype: size for size, dtypes in _DTYPES_BY_BYTES.items() for dtype in dtypes}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor's place in a file of an adapter; `offset` counts bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: str


@dataclass(frozen=True, slots=True)
class TensorCut(TensorRef):
    """A part of the tensor `whole`: of its elements as `view`, what `index` picks.

    `shape` and `nbytes` are the part's.
    """

    whole: TensorRef
    view: tuple[int, ...]
    index: tuple[int | slice, ...]


def read_header(path: Path) -> dict[str, TensorRef]:
    """Every tensor of the file by name.

    Raises AdapterUnservable unless the header is sound and the tensors cover the rest of the file
    exactly, and OSError when the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise AdapterUnservable(f"{path.name} is corrupt: its header is cut short or too long.")
        with _turn(length):
            return _parse(path.name, file.read(length), size)


def _turn(length: int) -> AbstractContextManager[Any]:
    return _LARGE_HEADER if length > _LARGE_HEADER_BYTES else nullcontext()


def _parse(file: str, data: bytes, size: int) -> dict[str, TensorRef]:
    """The tensors of a file of `size` bytes whose header is `data`."""
    header = read_object(f"{file} is corrupt: its header", data)
    header.pop("__metadata__", None)
    start = 8 + len(data)
    tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    _check_cover(file, tensors, start, size)
    return tensors


def _tensor(file: str, name: str, entry: Any, start: int) -> TensorRef:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    span: Any = fields.get("data_offsets")
    if not (_is_sizes(shape) and _is_sizes(span) and len(span) == 2 and isinstance(dtype, str)):
        raise AdapterUnservable(f"{file} is corrupt: the entry of {shown(name)} is malformed.")
    if dtype not in _ITEM_BYTES:
        raise AdapterUnservable(f"{file} holds {shown(name)} as {shown(dtype)}, an unknown type.")
    nbytes = span[1] - span[0]
    if nbytes != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise AdapterUnservable(f"{file} is corrupt: {shown(name)} does not have its shape's size.")
    return TensorRef(name, dtype, tuple(shape), start + span[0], nbytes, file)


def _is_sizes(value: Any) -> bool:
    """Whether this is a short list of sizes no file can exceed."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_cover(file: str, tensors: dict[str, TensorRef], start: int, size: int) -> None:
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise AdapterUnservable(f"{file} is corrupt: its tensors overlap or leave gaps.")
        end += tensor.nbytes
    if end != size:
        raise AdapterUnservable(f"{file} is corrupt: it should have {end} bytes and has {size}.")
