"""Random adapters as PEFT writes them, fast enough to make by the dozen."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.bench.gpu.device import DEVICE
from tests.bench.gpu.shapes import ALL_LINEAR, ATTENTION, Shape

_B_STD = 0.02  # not PEFT's zero: an adapter has to change the answer


def write_adapters(
    shape: Shape,
    root: Path,
    names: Sequence[str],
    rank: int,
    targets: Sequence[str] = ALL_LINEAR,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One folder a name under `root`, alpha = 2 * rank; every name has weights of its own."""
    for name in names:
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(_config(rank, targets)))
        generator = torch.Generator(DEVICE).manual_seed(hash_of(name))
        tensors = _tensors(shape, rank, targets, dtype, generator)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def drop_from_page_cache(root: Path) -> None:
    """Asks the system to read the files under `root` from the disk next time."""
    for path in root.rglob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def hash_of(name: str) -> int:
    """A seed that belongs to a name, the same in every process."""
    return int.from_bytes(name.encode(), "big") % (2**63 - 1)


def _config(rank: int, targets: Sequence[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "random",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }


def _tensors(
    shape: Shape,
    rank: int,
    targets: Sequence[str],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(shape.layers):
        for target in targets:
            block = "self_attn" if target in ATTENTION else "mlp"
            module = f"base_model.model.model.layers.{layer}.{block}.{target}"
            wide, out = shape.features(target)
            for side, sizes, std in (
                ("A", (rank, wide), 1 / math.sqrt(wide)),
                ("B", (out, rank), _B_STD),
            ):
                noise = torch.empty(sizes, dtype=dtype, device=DEVICE)
                noise.normal_(std=std, generator=generator)
                tensors[f"{module}.lora_{side}.weight"] = noise.cpu()
    return tensors
