"""A small layout written out by hand, and adapters for it written without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorafleet.cache.layout import (
    Interval,
    LoraSite,
    ModelLayout,
    TargetModule,
    VocabularyLayout,
)
from lorafleet.proto.flags import Bytes

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 48, 4, 2, 8, 2
VOCAB = 64

FEATURES = {  # name -> in, out
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj")


def tiny_layout(rank: int = 0, world: int = 1) -> ModelLayout:
    """A two-layer Llama's layout for one of `world` ranks."""
    return ModelLayout(
        "tiny-llama",
        tuple(
            LoraSite(
                f"{layer}:{names[0]}",
                tuple(_target(f"model.layers.{layer}.{name}", name, rank, world) for name in names),
            )
            for layer in range(LAYERS)
            for names in SITES
        ),
        VocabularyLayout(
            VOCAB, HIDDEN, (rank * VOCAB // world, (rank + 1) * VOCAB // world), is_tied=False
        ),
    )


def _target(path: str, name: str, rank: int, world: int) -> TargetModule:
    in_features, out_features = FEATURES[name]
    in_range: Interval = (0, in_features)
    out_range: Interval = (0, out_features)
    if name in ROW_PARALLEL:
        in_range = (rank * in_features // world, (rank + 1) * in_features // world)
    else:
        out_range = (rank * out_features // world, (rank + 1) * out_features // world)
    return TargetModule(path, in_features, out_features, in_range, (out_range,))


@dataclass(frozen=True)
class Settings:
    """What the store reads of a ShardConfig."""

    adapter_root: str
    adapter_cache_dir: str
    adapter_host_bytes: Bytes = Bytes("64MiB")
    adapter_disk_bytes: Bytes = Bytes("64MiB")
    adapter_s3_endpoint: str = ""
    adapter_s3_buckets: tuple[str, ...] = ()
    adapter_http_hosts: tuple[str, ...] = ()
    adapter_archive_bytes: Bytes = Bytes("64MiB")
    allow_pickled_adapters: bool = False
    adapter_answer_seconds: float = 10.0
    adapter_download_seconds: float = 60.0


def config_of(rank: int = 4, **fields: Any) -> dict[str, Any]:
    """An adapter_config.json as peft writes the fields that matter."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": "all-linear",
    } | fields


def tensors_of(
    names: tuple[str, ...] = ("self_attn.q_proj",), rank: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A and B for these modules in every layer, under the keys peft saves."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name in names:
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            in_features, out_features = FEATURES[name]
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, in_features, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(
                out_features, rank, generator=generator
            )
    return tensors


def write_adapter(
    directory: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes an adapter's directory; by default rank 4 on every q_proj."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config or config_of()))
    save_file(tensors or tensors_of(), directory / "adapter_model.safetensors")
    return directory


def split_weights(directory: Path) -> Path:
    """Makes an adapter's one file of weights two, with an index."""
    whole = directory / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    halves = {"00001": names[: len(names) // 2], "00002": names[len(names) // 2 :]}
    files: dict[str, str] = {}
    for number, half in halves.items():
        file = f"adapter_model-{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, directory / file)
        files |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (directory / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def pickle_weights(directory: Path, name: str = "adapter_model.bin") -> Path:
    """Makes an adapter's weights what torch.save writes."""
    whole = directory / "adapter_model.safetensors"
    torch.save(load_file(whole), directory / name)
    whole.unlink()
    return directory


class KnownWeights:
    """BaseWeights of a model that is in memory, by tensor name."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def rows(self, name: str, intervals: Sequence[Interval]) -> torch.Tensor:
        """See BaseWeights."""
        return torch.cat([self._tensors[name][start:stop] for start, stop in intervals])
