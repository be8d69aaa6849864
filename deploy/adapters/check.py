"""Checks adapter folders as a shard would: headers, shapes and values, against a model's config.

No weights of the base model are read, and none are allocated: the model is built on torch's meta
device for its layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lorafleet.cache.adapter_files import digest_files, read_spec
from lorafleet.cache.errors import AdapterFault
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.packing import pack
from lorafleet.deploy.adapters.verdict import Verdict
from lorafleet.shard.group import Group
from lorafleet.shard.model import Decoder


def check_folders(
    paths: Sequence[str], model_id: str, revision: str, num_shard: int, dtype: str
) -> list[Verdict]:
    """A verdict for each folder. Raises ValueError when the model cannot be served itself."""
    config = _config(model_id, revision)
    kind = _dtype(dtype, config)
    layouts = [_layout(config, rank, num_shard, kind) for rank in range(num_shard)]
    return [_check(path, layouts, kind) for path in paths]


def _check(path: str, layouts: list[ModelLayout], dtype: torch.dtype) -> Verdict:
    try:
        spec = read_spec(Path(path), layouts[0])
        forms = [spec.form(layout, dtype.itemsize) for layout in layouts]
        for layout, form in zip(layouts, forms, strict=True):
            pack(read_spec(Path(path), layout), layout, allocate(form, dtype, False), _ignore)
        return Verdict(
            path=path,
            rank=spec.rank,
            num_modules=len(spec.modules),
            target_modules=spec.target_modules,
            packed_bytes=max(form.nbytes for form in forms),
            digest=digest_files(spec, _ignore),
        )
    except AdapterFault as fault:
        return Verdict(path, str(fault))


def _config(model_id: str, revision: str) -> Any:
    name, _, pinned = (model_id, "", "") if Path(model_id).is_dir() else model_id.partition("@")
    try:
        return AutoConfig.from_pretrained(name, revision=revision or pinned or None)
    except OSError as error:
        raise ValueError(f"--model-id {model_id}: {str(error).splitlines()[0]}") from error


def _layout(config: Any, rank: int, num_shard: int, dtype: torch.dtype) -> ModelLayout:
    if num_shard < 1:
        raise ValueError(f"--num-shard must be at least 1, got {num_shard}")
    meta = torch.device("meta")
    place = Group(rank, 1, meta, "")  # joins nobody: no step is run here
    place.size = num_shard
    return Decoder(config, place, dtype, meta).layout


def _dtype(name: str, config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None) if name == "auto" else getattr(torch, name)
    return found if isinstance(found, torch.dtype) else torch.float32


def _ignore(done: int) -> None:
    """Progress nobody watches."""
