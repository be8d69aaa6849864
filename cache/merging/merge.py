"""Merge: several adapters as one, as peft's `LoraModel.add_weighted_adapter` makes it."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.merging.combine import combine
from lorafleet.cache.merging.member import MemberChanged, MergeMember
from lorafleet.cache.merging.recipe import MergeRecipe
from lorafleet.cache.weight_files import CONFIG_FILE, WEIGHTS_FILE
from lorafleet.proto.messages import FetchProgress

# peft gives the result the first member's, and so drops what only others adapt.
_EQUAL_FIELDS = ("layers_to_transform", "layers_pattern", "exclude_modules")

Progress = Callable[[FetchProgress], None]


class Merge:
    """The members of one recipe, found to fit each other."""

    def __init__(
        self, recipe: MergeRecipe, members: list[MergeMember], layout: ModelLayout
    ) -> None:
        """Raises AdapterUnservable for members that cannot be merged."""
        self._recipe, self._members = recipe, members
        _check_members(members)
        # In the model's order, which is the order in which peft draws random numbers.
        modules = set().union(*(member.spec.modules for member in members))
        assert modules <= layout.targets().keys(), "a module has no place in the layout"
        self._modules = {
            name: holders
            for name in layout.targets()
            if (holders := [member for member in members if name in member.spec.modules])
        }
        self._ranks = {name: _rank(name, holders) for name, holders in self._modules.items()}
        self._config = json.dumps(self._describe()).encode()
        self._header = _header(self._shapes())

    @property
    def nbytes(self) -> int:
        """Bytes of the merged adapter's files."""
        data = sum(4 * math.prod(shape) for shape in self._shapes().values())
        return len(self._config) + len(self._header) + data

    def write(self, directory: Path, progress: Progress) -> int:
        """Writes config and weights, a tensor at a time; returns their bytes.

        Raises MemberChanged when a member's files changed meanwhile.
        """
        try:
            done = self._write(directory, progress)
        except AdapterUnservable:
            self._check_current()  # then it is not the adapter's fault
            raise
        self._check_current()
        assert done == self.nbytes, (done, self.nbytes)
        return done

    def _write(self, directory: Path, progress: Progress) -> int:
        (directory / CONFIG_FILE).write_bytes(self._config)
        done, total = len(self._config), self.nbytes
        with (directory / WEIGHTS_FILE).open("wb") as file:
            done += file.write(self._header)
            for tensor in self._tensors():
                done += file.write(tensor.contiguous().numpy().data)
                progress(FetchProgress("merging", done, total))
            file.flush()
            os.fsync(file.fileno())
        return done

    def _check_current(self) -> None:
        for member in self._members:
            try:
                is_current = member.spec.is_current()
            except AdapterUnservable:
                is_current = False
            if not is_current:
                raise MemberChanged(
                    f"The files of {member.name} changed while it was merged; try again."
                )

    def _tensors(self) -> Iterator[torch.Tensor]:
        """A and B of each module in turn."""
        generator = torch.Generator().manual_seed(self._recipe.seed)
        for name, holders in self._modules.items():
            sides = [member.tensors(name) for member in holders]
            weights = self._weights(name)
            roots = [math.sqrt(abs(weight)) for weight in weights]
            # The sign goes with A alone: on both sides it would be lost.
            signed = [math.copysign(*pair) for pair in zip(roots, weights, strict=True)]
            yield combine([a for a, _ in sides], signed, self._recipe, generator)
            yield combine([b for _, b in sides], roots, self._recipe, generator)

    def _weights(self, name: str) -> list[float]:
        """Weight times scale of each member that has the module."""
        pairs = zip(self._members, self._recipe.members, strict=True)
        return [
            asked.weight * member.spec.modules[name].scale
            for member, asked in pairs
            if name in member.spec.modules
        ]

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Every tensor in the file, in its order."""
        shapes = {}
        for name, holders in self._modules.items():
            target, rank = holders[0].spec.modules[name].target, self._ranks[name]
            shapes[f"base_model.model.{name}.lora_A.weight"] = rank, target.in_features
            shapes[f"base_model.model.{name}.lora_B.weight"] = target.out_features, rank
        return shapes

    def _describe(self) -> dict[str, Any]:
        """The config. The members' scales are in the tensors, so the merge's own is 1.

        But peft keeps the first member's `use_rslora` and sets alpha to r, so that after an rsLoRA
        the result is scaled by sqrt(r); and what peft answers is what is served.
        """
        first = self._members[0]
        scale = math.sqrt(first.rank) if first.config.get("use_rslora") else 1.0
        odd = {name: rank for name, rank in self._ranks.items() if rank != first.rank}
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": first.config.get("base_model_name_or_path"),
            "r": first.rank,
            "lora_alpha": first.rank * scale,
            "bias": "none",
            "target_modules": list(self._modules),
            "rank_pattern": {re.escape(name): rank for name, rank in odd.items()},
            "alpha_pattern": {re.escape(name): rank * scale for name, rank in odd.items()},
        }


def _check_members(members: list[MergeMember]) -> None:
    first = members[0]
    for member in members[1:]:
        if member.rank != first.rank:
            raise AdapterUnservable(
                f"Adapters of different ranks cannot be merged: {first.name} has rank "
                f"{first.rank}, {member.name} has {member.rank}."
            )
        for field in _EQUAL_FIELDS:
            if _unordered(member.config.get(field)) != _unordered(first.config.get(field)):
                raise AdapterUnservable(
                    f"Adapters with different {field} cannot be merged: {first.name} and "
                    f"{member.name}."
                )


def _unordered(value: Any) -> Any:
    """peft saves sets as lists in any order, and an absent field as null."""
    return sorted(map(str, value)) if isinstance(value, list) else value or None


def _rank(name: str, holders: list[MergeMember]) -> int:
    """The rank all of them give a module."""
    first, *others = holders
    rank = first.spec.modules[name].rank
    for member in others:
        if member.spec.modules[name].rank != rank:
            raise AdapterUnservable(
                f"Adapters of different ranks cannot be merged: on {name}, {first.name} has rank "
                f"{rank}, {member.name} has {member.spec.modules[name].rank}."
            )
    return rank


def _header(shapes: Mapping[str, tuple[int, int]]) -> bytes:
    """A safetensors file's beginning: 8 bytes of length, then JSON; the tensors follow."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    data = json.dumps(entries).encode()
    data += b" " * (-len(data) % 8)
    return struct.pack("<Q", len(data)) + data
