"""What `make gpu` needs of its Python, looked at before anything is installed: this file imports
nothing of the project. Exits with a sentence that names what is missing."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "grpc")
_MIN_SETUPTOOLS = 77  # the first that reads the licence as pyproject.toml has it
_PROTO = Path(__file__).parents[3] / "proto"


def missing() -> list[str]:
    """Everything that is not there, as a user would install it."""
    found = [name for name in _PACKAGES if find_spec(name) is None]
    if _setuptools() < _MIN_SETUPTOOLS:
        found.append(f"setuptools>={_MIN_SETUPTOOLS}")
    if not (_PROTO / "shard_pb2.py").exists() and find_spec("grpc_tools") is None:
        found.append("grpcio-tools (or `make proto` run before)")
    if "torch" not in found and not _has_device():
        found.append("a CUDA device that torch can use")
    return found


def _setuptools() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    """Silent if all is there."""
    if absent := missing():
        sys.exit(
            f"make gpu: {sys.executable} lacks {', '.join(absent)}; set PYTHON to one that has "
            "them (nothing is downloaded)"
        )


if __name__ == "__main__":
    main()
