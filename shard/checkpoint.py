"""Checkpoint: a Hugging Face model folder, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from lorafleet.shard.errors import BadCheckpoint
from lorafleet.shard.fused_experts import ExpertSlice, fused_place

Interval = tuple[int, int]

_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def locate(model_id: str, revision: str) -> Path:
    """The folder of a model: `model_id` itself if it is one, else a download of the hub's.

    Raises BadCheckpoint when there is neither.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    name, _, pinned = model_id.partition("@")
    try:
        return Path(
            snapshot_download(name, revision=revision or pinned or None, allow_patterns=_FILES)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise BadCheckpoint(
            f"--model-id {model_id} is not a directory, and the hub says: {error}"
        ) from error


class Checkpoint:
    """The tensors of a folder, in one safetensors file or several with an index.

    Reads touch only the bytes of the interval asked for. Use as a context manager.
    """

    def __init__(self, directory: Path) -> None:
        """Raises BadCheckpoint when the folder has no readable safetensors weights."""
        self.directory = directory
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        for path in _weight_files(directory):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(f"{path}: {error}") from error
            self._where |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files."""
        self._where.clear()
        self._stack.close()

    def rows(self, name: str, intervals: Iterable[Interval]) -> torch.Tensor:
        """The given runs of a tensor's first dimension, joined in order."""
        tensor = self._slice(name)
        return torch.cat([tensor[start:stop] for start, stop in intervals])

    def columns(self, name: str, interval: Interval) -> torch.Tensor:
        """A run of a matrix's second dimension."""
        return self._slice(name)[:, interval[0] : interval[1]]  # type: ignore[no-any-return]

    def _slice(self, name: str) -> Any:
        if name in self._where:
            return self._where[name].get_slice(name)
        place = fused_place(name)
        if place is None or place.tensor not in self._where:
            raise BadCheckpoint(f"{self.directory} has no tensor {name!r}")
        tensor = self._where[place.tensor].get_slice(place.tensor)
        return tensor if place.expert is None else ExpertSlice(tensor, place)


def _weight_files(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    raise BadCheckpoint(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json"
    )
