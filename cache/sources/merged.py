"""MergedSource: adapters made here of others, as peft's `LoraModel.add_weighted_adapter` does.

The result is an adapter's directory like any other, in the disk tier: quota, restarts and the
ranks of one machine share it as they share a download.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from lorafleet.cache.adapter_files import AdapterSpec, read_spec, read_tensors
from lorafleet.cache.combine import combine
from lorafleet.cache.disk_tier import DiskTier, Download
from lorafleet.cache.errors import AdapterNotFound, AdapterUnservable, SourceUnavailable, shown
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.peft_config import MAX_CONFIG_BYTES
from lorafleet.cache.recipe import SOURCE, MergeRecipe, members_of
from lorafleet.cache.sources import local
from lorafleet.cache.sources.downloads import Downloads
from lorafleet.cache.sources.source import AdapterSource, Progress
from lorafleet.cache.sources.transfer import disk_faults
from lorafleet.cache.tokenizer_files import is_same_tokenizer, read_tokenizer
from lorafleet.cache.weight_files import CONFIG_FILE, WEIGHTS_FILE
from lorafleet.cache.weights_reader import WeightsReader
from lorafleet.proto.messages import AdapterKey, FetchProgress

_FORMAT = 1  # of what is written; another one is made anew

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
# peft gives the result the first member's, and so drops what only others adapt.
_EQUAL_FIELDS = ("layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True, slots=True)
class _Member:
    """A member that was read as far as its headers."""

    name: str  # for messages
    config: dict[str, Any]
    spec: AdapterSpec

    @property
    def rank(self) -> int:
        """The largest rank the config has, whether or not a module has it: what peft compares."""
        pattern: dict[str, int] = self.config.get("rank_pattern") or {}
        rank: int = self.config.get("r", 8)
        return max([rank, *pattern.values()])


class MergedSource(Downloads):
    """`id` is a recipe (cache/recipe.py). Whoever may use all members may use the merge."""

    def __init__(
        self,
        disk: DiskTier,
        sources: Mapping[str, AdapterSource],
        layout: ModelLayout,
        allow_pickles: bool,
        base_tokenizer: bytes = b"",
    ) -> None:
        """`sources`: where members come from, by name.

        `base_tokenizer`: the base model's tokenizer.json, which a merge is spoken to with; empty
        where it is not known, and then members' are not looked at.
        """
        super().__init__(disk, SOURCE)
        self._base_tokenizer = base_tokenizer
        self._sources, self._layout, self._allow_pickles = sources, layout, allow_pickles
        self._work = Lock()  # one merge at a time, and on one core: the others are for steps

    def fetch(
        self, key: AdapterKey, api_token: str, progress: Progress, refresh: bool = False
    ) -> Path:
        """Fetches the members as this caller, and merges them unless that is done already.

        The members are taken as they are held, with `refresh` too.
        """
        recipe = _recipe(key)
        found = {
            member: self._read_member(str(member), self._fetch_member(member, api_token, progress))
            for member in members_of(key)
        }
        merge = _Merge(recipe, [found[member.key] for member in recipe.members], self._layout)
        download = self._download(key, merge, found)
        with self._disk.lock(key):
            if self._disk.get(key) != download:
                self._disk.put(download, lambda aside: self._write(merge, aside, progress))
        return self._disk.path(key)

    def authorize(self, key: AdapterKey, api_token: str) -> None:
        """Every member's source decides; a member that is not here any more is fetched again."""
        for member in members_of(key):
            self._fetch_member(member, api_token, lambda _: None)

    def _read_member(self, name: str, directory: Path) -> _Member:
        member = _read_member(name, directory, self._layout, self._allow_pickles)
        if self._base_tokenizer:
            _check_tokenizer(member.name, directory, self._base_tokenizer)
        return member

    def _fetch_member(self, member: AdapterKey, api_token: str, progress: Progress) -> Path:
        source = self._sources.get(member.source)
        if source is None:
            raise AdapterNotFound(
                f"There is no adapter source {shown(member.source)}; it must be one of "
                f"{', '.join(self._sources)}."
            )
        return source.fetch(member, api_token, progress)

    def _download(
        self, key: AdapterKey, merge: _Merge, members: Mapping[AdapterKey, _Member]
    ) -> Download:
        """As restricted as its members; its commit names their content and what is made of it."""
        copies = {member: self._disk.get(member) for member in members}
        states = [
            copy.commit if copy is not None and copy.commit else str(members[member].spec.states)
            for member, copy in copies.items()
        ]
        is_restricted = any(
            member.source != local.SOURCE and (copy is None or copy.is_restricted)
            for member, copy in copies.items()
        )
        commit = hashlib.sha256(json.dumps([_FORMAT, key.id, states]).encode()).hexdigest()
        return Download(key, commit, merge.nbytes, is_restricted)

    def _write(self, merge: _Merge, directory: Path, progress: Progress) -> int:
        with self._work, _one_core():
            return merge.write(directory, progress)


class _Merge:
    """The members of one recipe, found to fit each other."""

    def __init__(self, recipe: MergeRecipe, members: list[_Member], layout: ModelLayout) -> None:
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

        Raises SourceUnavailable when a member's files changed meanwhile.
        """
        try:
            with disk_faults("the merged adapter"):
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
                raise SourceUnavailable(
                    f"The files of {member.name} changed while it was merged; try again."
                )

    def _tensors(self) -> Iterator[torch.Tensor]:
        """A and B of each module in turn."""
        generator = torch.Generator().manual_seed(self._recipe.seed)
        for name, holders in self._modules.items():
            sides = [_read(member, name) for member in holders]
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


@contextmanager
def _one_core() -> Iterator[None]:
    """This thread, and those begun meanwhile, compute on one core; no other is touched."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _recipe(key: AdapterKey) -> MergeRecipe:
    if key.revision:
        raise AdapterUnservable("A merged adapter has no revisions; its members may.")
    try:
        return MergeRecipe.parse(key.id)
    except ValueError as error:
        sentence = str(error)
        raise AdapterUnservable(f"{sentence[:1].upper()}{sentence[1:]}.") from None


def _read_member(name: str, directory: Path, layout: ModelLayout, allow_pickles: bool) -> _Member:
    """Raises AdapterUnservable, naming the member, unless it is a plain LoRA on linear layers."""
    try:
        config = _read_config(directory / CONFIG_FILE)
        spec = read_spec(directory, layout, allow_pickles=allow_pickles)
        tensors = read_tensors(directory, spec.states)
    except AdapterUnservable as error:
        raise AdapterUnservable(f"{shown(name)} cannot be merged: {error}") from None
    except OSError:
        raise SourceUnavailable(f"The files of {shown(name)} changed; try again.") from None
    plain = {ref.name for module in spec.modules.values() for ref in (module.a, module.b)}
    for tensor in tensors:
        if tensor not in plain or not tensor.endswith(_PLAIN_SUFFIXES):
            raise AdapterUnservable(
                f"{shown(name)} cannot be merged: its tensor {shown(tensor)} is not a LoRA weight "
                "of an attention or MLP layer, and only those are merged."
            )
    return _Member(shown(name), config, spec)


def _check_tokenizer(name: str, directory: Path, base: bytes) -> None:
    """Raises AdapterUnservable for a member that was trained on other tokens than the base's."""
    try:
        own = read_tokenizer(directory).tokenizer_json
    except AdapterUnservable as error:
        raise AdapterUnservable(f"{name} cannot be merged: {error}") from None
    if own and not is_same_tokenizer(own, base):
        raise AdapterUnservable(
            f"{name} cannot be merged: its tokenizer.json makes other tokens of a text than the "
            "base model's, and a merge is spoken to with the base model's."
        )


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


def _check_members(members: list[_Member]) -> None:
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


def _rank(name: str, holders: list[_Member]) -> int:
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


def _read(member: _Member, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A member's whole A and B of one module."""
    module = member.spec.modules[name]
    with WeightsReader(member.spec.directory) as reader:
        a, b = reader.read(module.a).float(), reader.read(module.b).float()
    for side, tensor in (("A", a), ("B", b)):
        if not torch.isfinite(tensor).all():
            raise AdapterUnservable(
                f"{member.name} cannot be merged: lora_{side} of {name} holds "
                "values that are not finite numbers."
            )
    return a, b


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
