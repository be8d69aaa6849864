"""MergeMember: an adapter that may be merged with others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafleet.cache.adapter_files import AdapterSpec, read_spec, read_tensors
from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.peft_config import MAX_CONFIG_BYTES
from lorafleet.cache.tokenizer_files import is_same_tokenizer, parse_tokenizer, read_tokenizer
from lorafleet.cache.weight_files import CONFIG_FILE
from lorafleet.cache.weights_reader import WeightsReader

# Fields of what is not a plain LoRA on linear layers; peft merges these wrongly or not at all.
_UNMERGED_FIELDS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
)
_PLAIN_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


class MemberChanged(Exception):
    """A member's files are others by now, or gone: read it again."""


@dataclass(frozen=True, slots=True)
class MergeMember:
    """One that was read as far as its headers."""

    name: str  # for messages
    config: dict[str, Any]
    spec: AdapterSpec

    @property
    def rank(self) -> int:
        """The largest rank the config has, whether or not a module has it: what peft compares."""
        pattern: dict[str, int] = self.config.get("rank_pattern") or {}
        rank: int = self.config.get("r", 8)
        return max([rank, *pattern.values()])

    @classmethod
    def read(
        cls, name: str, directory: Path, layout: ModelLayout, allow_pickles: bool
    ) -> MergeMember:
        """Raises AdapterUnservable, naming the member, but for a plain LoRA on linear layers.

        Raises MemberChanged as well.
        """
        try:
            config = _read_config(directory / CONFIG_FILE)
            spec = read_spec(directory, layout, allow_pickles=allow_pickles)
            tensors = read_tensors(directory, spec.states)
        except AdapterUnservable as error:
            raise AdapterUnservable(f"{shown(name)} cannot be merged: {error}") from None
        except OSError:
            raise MemberChanged(f"The files of {shown(name)} changed; try again.") from None
        plain = {ref.name for module in spec.modules.values() for ref in (module.a, module.b)}
        for tensor in tensors:
            if tensor not in plain or not tensor.endswith(_PLAIN_SUFFIXES):
                raise AdapterUnservable(
                    f"{shown(name)} cannot be merged: its tensor {shown(tensor)} is not a LoRA "
                    "weight of an attention or MLP layer, and only those are merged."
                )
        return cls(shown(name), config, spec)

    def check_tokenizer(self, base: bytes) -> None:
        """Raises AdapterUnservable if it was trained on other tokens than `base` makes of a text.

        `base`: a tokenizer.json.
        """
        try:
            own = read_tokenizer(self.spec.directory).tokenizer_json
            if not own or own == base:
                return
            is_same = is_same_tokenizer(parse_tokenizer(own), parse_tokenizer(base))
        except AdapterUnservable as error:
            raise AdapterUnservable(f"{self.name} cannot be merged: {error}") from None
        if not is_same:
            raise AdapterUnservable(
                f"{self.name} cannot be merged: its tokenizer.json makes other tokens of a text "
                "than the base model's, and a merge is spoken to with the base model's."
            )

    def tensors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole A and B of one module, as float32. Raises AdapterUnservable."""
        refs = self.spec.modules[module]
        with WeightsReader(self.spec.directory) as reader:
            a, b = reader.read(refs.a).float(), reader.read(refs.b).float()
        for side, tensor in (("A", a), ("B", b)):
            if not torch.isfinite(tensor).all():
                raise AdapterUnservable(
                    f"{self.name} cannot be merged: lora_{side} of {module} holds "
                    "values that are not finite numbers."
                )
        return a, b


def _read_config(path: Path) -> dict[str, Any]:
    """The config's fields, not checked but for what no merge can have."""
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        config = {}  # `read_spec` says what is wrong with it
    if not isinstance(config, dict):
        return {}
    fields = [field for field in _UNMERGED_FIELDS if config.get(field)]
    fields += ["bias"] if config.get("bias") not in (None, "none") else []
    if fields:
        raise AdapterUnservable(
            f"{fields[0]} is set, and only plain LoRA on linear layers is merged."
        )
    return config
