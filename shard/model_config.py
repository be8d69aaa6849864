"""A model's configuration as transformers understands it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lorafleet.shard.errors import BadCheckpoint
from lorafleet.shard.model_folder import read_config


def model_config(model_id: str, place: str | Path, revision: str | None = None) -> Any:
    """The configuration of `model_id`, which `place`, a folder or a hub's name, has.

    Raises BadCheckpoint when there is none or transformers cannot use it.
    """
    is_folder = Path(place).is_dir()
    if is_folder:
        read_config(model_id, Path(place))
    try:
        return AutoConfig.from_pretrained(place, revision=revision)
    except Exception as error:  # its classes stumble in their own ways over what a file may say
        told = " ".join(str(error).split("\n\n")[0].split())  # what follows is about pip
        where = "config.json: " if is_folder else ""
        raise BadCheckpoint(f"--model-id {model_id}: {where}{told}") from error
