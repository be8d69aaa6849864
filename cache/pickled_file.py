"""An adapter's weights as torch saves them: read by torch alone, which then executes nothing.

`weights_only` lets a pickle make tensors and containers and refuses whatever else it names. What
remains is size: the file must be a zip archive without compression, so that nothing in it is
larger than it, and shapes are read without their data.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.safetensors_file import TensorRef

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
    is_stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
    if not is_stored or sum(member.file_size for member in members) > path.stat().st_size:
        raise AdapterUnservable(f"{path.name} is compressed, which torch.save does not do.")


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
        if not isinstance(name, str) or not _is_plain(tensor):
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
