"""Checks adapter folders as a shard would: headers, shapes and values, against a model's config.

The model is built on torch's meta device for its layout. Its weights are read where an adapter
depends on them and they are at hand; ones stand in for them where only a config.json is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from lorafleet.cache.adapter_files import AdapterSpec, digest_files, read_spec
from lorafleet.cache.base_weights import BaseWeights
from lorafleet.cache.errors import AdapterFault
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.layout import Interval, ModelLayout
from lorafleet.cache.packing import pack
from lorafleet.cache.tokenizer_files import TOKENIZER_FILE, read_tokenizer
from lorafleet.deploy.adapters.verdict import Verdict
from lorafleet.router.errors import AdapterError
from lorafleet.router.prompt_form import open_tokenizer
from lorafleet.shard.base_weights import CheckpointWeights
from lorafleet.shard.checkpoint import Checkpoint
from lorafleet.shard.errors import BadCheckpoint
from lorafleet.shard.group import Group
from lorafleet.shard.model import Decoder
from lorafleet.shard.model_config import model_config


def check_folders(
    paths: Sequence[str],
    model_id: str,
    revision: str,
    num_shard: int,
    dtype: str,
    allow_pickles: bool = False,
) -> list[Verdict]:
    """A verdict for each folder. Raises ValueError when the model cannot be served itself."""
    config = model_config(model_id, *_name(model_id, revision))
    kind = _dtype(dtype, config)
    layouts = [_layout(config, rank, num_shard, kind) for rank in range(num_shard)]
    base, tokenizer = _base(model_id, layouts[0], kind), _tokenizer_file(model_id, revision)

    def read(path: str, layout: ModelLayout) -> AdapterSpec:
        return read_spec(Path(path), layout, base, allow_pickles)

    return [_check(path, layouts, read, kind, tokenizer) for path in paths]


def _check(
    path: str,
    layouts: list[ModelLayout],
    read: Callable[[str, ModelLayout], AdapterSpec],
    dtype: torch.dtype,
    tokenizer: bytes,
) -> Verdict:
    try:
        forms = []
        for layout in layouts:
            spec = read(path, layout)
            forms.append(spec.form(layout, dtype.itemsize))
            pack(spec, layout, allocate(forms[-1], dtype, False), _ignore)
        shipped = read_tokenizer(Path(path)).tokenizer_json
        if shipped:
            open_tokenizer(shipped, tokenizer, 1).close()
        return Verdict(
            path=path,
            rank=spec.rank,
            num_modules=len(spec.modules),
            target_modules=spec.target_modules,
            packed_bytes=max(form.nbytes for form in forms),
            digest=digest_files(spec, _ignore),
        )
    except (AdapterFault, AdapterError) as fault:
        return Verdict(path, str(fault))


def _base(model_id: str, layout: ModelLayout, dtype: torch.dtype) -> BaseWeights:
    try:
        Checkpoint(Path(model_id)).close()
    except BadCheckpoint:
        return _Ones(layout)
    return CheckpointWeights(Path(model_id), dtype)


class _Ones:
    """Weights of the right shapes, for what does not depend on their values."""

    def __init__(self, layout: ModelLayout) -> None:
        self._targets = layout.targets()

    def rows(self, name: str, intervals: Sequence[Interval]) -> torch.Tensor:
        """See BaseWeights."""
        module, _, kind = name.rpartition(".")
        count = sum(stop - start for start, stop in intervals)
        shape = (count,) if kind == "bias" else (count, self._targets[module].in_features)
        return torch.ones(shape)


def _tokenizer_file(model_id: str, revision: str) -> bytes:
    """The base model's, which adapters' are compared with; an empty one where there is none."""
    name, wanted = _name(model_id, revision)
    path = cached_file(
        name, TOKENIZER_FILE, revision=wanted, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return Path(path).read_bytes() if path else b"{}"


def _name(model_id: str, revision: str) -> tuple[str, str | None]:
    """A folder, or a hub's name and revision."""
    name, _, pinned = (model_id, "", "") if Path(model_id).is_dir() else model_id.partition("@")
    return name, revision or pinned or None


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
