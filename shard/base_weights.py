"""CheckpointWeights: the cache's BaseWeights, read from the model's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import torch
from safetensors import SafetensorError

from lorafleet.cache.errors import SourceUnavailable
from lorafleet.shard.checkpoint import Checkpoint, Interval
from lorafleet.shard.errors import BadCheckpoint


class CheckpointWeights:
    """A folder's weights in the dtype they are served in. Opened on first use, for good."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._directory, self._dtype = directory, dtype
        self._checkpoint: Checkpoint | None = None
        self._lock = Lock()  # guards the checkpoint and what is read of it

    def rows(self, name: str, intervals: Sequence[Interval]) -> torch.Tensor:
        """See BaseWeights."""
        try:
            with self._lock:
                if self._checkpoint is None:
                    self._checkpoint = Checkpoint(self._directory)
                return self._checkpoint.rows(name, intervals).to(self._dtype)
        except (BadCheckpoint, SafetensorError, OSError):
            raise SourceUnavailable(
                f"{name} of the base model, on which the adapter's weights depend, cannot be "
                "read any more."
            ) from None
