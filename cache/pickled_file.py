"""An adapter's weights as torch saves them: read by torch alone, which then executes nothing.

`weights_only` lets a pickle make tensors and containers and refuses whatever else it names. What
remains is size: the file must be a zip archive without compression, so that nothing in it is
larger than it, its objects must be no larger than a tensor's are however often a pickle puts one
into another, and shapes are read without their data.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.safetensors_file import TensorRef

_ZIP_START = b"PK\x03\x04"  # by which torch tells a zip archive from its older format
_PICKLE = "data.pkl"
_MAX_PICKLE_BYTES = 16 << 20  # of names and shapes
# Of one object with all it is made of, which a hash or a text of it would go through one by one. A
# tensor has about twenty.
_MAX_OBJECT_PARTS = 1000
# They put what is above a container into it. Those are not hashed, nor written out.
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}


def read_pickled_header(path: Path) -> dict[str, TensorRef]:
    """Every tensor of the file by name; offsets say nothing.

    Raises AdapterUnservable for anything but tensors by name, and OSError.
    """
    _check_archive(path)
    return {name: _ref(path.name, name, tensor) for name, tensor in _load(path, "meta").items()}


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file by name. Raises as `read_pickled_header`."""
    _check_archive(path)
    return _load(path, "cpu")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError:
        raise
    except Exception as error:
        raise AdapterUnservable(
            f"{path.name} is not a file that torch.save wrote ({type(error).__name__})."
        ) from None
    with path.open("rb") as file:
        if file.read(len(_ZIP_START)) != _ZIP_START:
            raise AdapterUnservable(f"{path.name} is not a file that torch.save wrote.")
    is_stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
    if not is_stored or sum(member.file_size for member in members) > path.stat().st_size:
        raise AdapterUnservable(f"{path.name} is compressed, which torch.save does not do.")
    pickles = [member for member in members if member.filename.endswith(_PICKLE)]
    if sum(member.file_size for member in pickles) > _MAX_PICKLE_BYTES:
        raise AdapterUnservable(
            f"{path.name} has a pickle of more than {_MAX_PICKLE_BYTES} bytes beside its tensors."
        )
    try:
        # As torch.load reads it, so that no other archive can be meant.
        pickled: bytes = torch._C.PyTorchFileReader(str(path)).get_record(_PICKLE)
        parts = _parts_of_largest(pickled)
    except Exception as error:
        raise AdapterUnservable(
            f"{path.name} is not a file that torch.save wrote ({type(error).__name__})."
        ) from None
    if parts > _MAX_OBJECT_PARTS:
        raise AdapterUnservable(
            f"{path.name} holds other objects than tensors by name: no object in its pickle may "
            f"have more than {_MAX_OBJECT_PARTS} parts."
        )


def _parts_of_largest(pickled: bytes) -> int:
    """How many parts the largest object has, counting one as often as it is put into others.

    Raises ValueError or LookupError for what is no pickle.
    """
    stack: list[int] = []
    marks: list[int] = []  # where on the stack they are
    memo: dict[Any, int] = {}
    largest = 1
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            taken = _take(stack, marks, opcode)
            parts = taken[0] if opcode.name in _FILLING else 1 + sum(taken)
            stack += [parts] * len(opcode.stack_after)
            largest = max(largest, parts)
            if largest > _MAX_OBJECT_PARTS:
                break
    return largest


def _take(stack: list[int], marks: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """What an operation takes off the stack."""
    before = opcode.stack_before
    start = len(stack) - len(before)
    if pickletools.markobject in before:
        start = marks.pop() - before.index(pickletools.markobject)
    if start < 0:
        raise ValueError("the stack is empty")
    taken = stack[start:]
    del stack[start:]
    return taken


def _load(path: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        loaded: Any = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise AdapterUnservable(
            f"{path.name} cannot be loaded as weights alone ({type(error).__name__})."
        ) from None
    if not isinstance(loaded, dict):
        raise AdapterUnservable(f"{path.name} does not hold tensors by name.")
    for name, tensor in loaded.items():
        if not isinstance(name, str):
            raise AdapterUnservable(f"{path.name} has a name that is a {type(name).__name__}.")
        if not _is_plain(tensor):
            raise AdapterUnservable(f"{path.name} holds {shown(name)}, which is no plain tensor.")
    return loaded


def _is_plain(tensor: Any) -> bool:
    """Whether every element has memory of its own."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _ref(file: str, name: str, tensor: torch.Tensor) -> TensorRef:
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    nbytes = tensor.numel() * tensor.element_size()
    return TensorRef(name, dtype, tuple(tensor.shape), 0, nbytes, file)
