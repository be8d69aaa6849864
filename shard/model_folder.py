"""What a model's folder says before anything is loaded; the launcher looks, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorafleet.shard.errors import BadCheckpoint
from lorafleet.shard.partition import check_even

_CONFIG = "config.json"


def check_model(model_id: str, num_shard: int) -> None:
    """Raises ValueError, naming the flag, when shards could not serve this.

    Of a hub's model nothing is known yet: its shards tell.
    """
    check_path(model_id)
    if Path(model_id).is_dir():
        check_even(SimpleNamespace(**read_config(model_id, Path(model_id))), num_shard)


def check_path(model_id: str) -> None:
    """Raises BadCheckpoint for what looks like a path, and no hub id, and is no directory."""
    if model_id.startswith((".", "/", "~")) and not Path(model_id).is_dir():
        raise BadCheckpoint(f"--model-id {model_id} is not a directory")


def read_config(model_id: str, directory: Path) -> dict[str, Any]:
    """The config.json of `model_id`, which lies there. Raises BadCheckpoint when it is of no use.

    Only what transformers says less well is checked.
    """
    try:
        config = json.loads((directory / _CONFIG).read_bytes())
    except FileNotFoundError as error:
        raise BadCheckpoint(f"--model-id {model_id} has no {_CONFIG}") from error
    except OSError as error:
        raise BadCheckpoint(f"--model-id {model_id}: {_CONFIG}: {error.strerror}") from error
    except ValueError as error:
        raise BadCheckpoint(f"--model-id {model_id}: {_CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadCheckpoint(f"--model-id {model_id}: {_CONFIG} has no model_type")
    return config
