"""An adapter's directory, read as far as its headers: AdapterSpec, or the reason it is refused."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lorafleet.cache.base_weights import BaseWeights
from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.linears import PREFIX, ModuleSpec, read_linears
from lorafleet.cache.packed_form import PackedForm, plan_form
from lorafleet.cache.parts import PartSpec
from lorafleet.cache.peft_config import MAX_CONFIG_BYTES, parse_config
from lorafleet.cache.pickled_file import read_pickled_header
from lorafleet.cache.safetensors_file import TensorRef, read_header
from lorafleet.cache.tokenizer_files import check_size
from lorafleet.cache.vocabulary_parts import Differing, vocabulary_name, vocabulary_parts
from lorafleet.cache.weight_files import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    PICKLE_FILES,
    WEIGHTS_FILE,
    adapter_files,
    parse_index,
)

_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileState:
    """Tells whether a file is still the one that was read."""

    inode: int
    nbytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter that can be served on the layout it was read for."""

    directory: Path
    states: dict[str, FileState]  # of its files, config first, when they were read
    modules: dict[str, ModuleSpec]  # by full module name
    parts: tuple[PartSpec, ...] = ()
    allow_pickles: bool = False  # as it was read
    num_tokens: int = 0  # of the embedding, where the adapter changes it; 0 = the base's

    @property
    def rank(self) -> int:
        """The largest rank of any module, 0 without LoRA."""
        ranks = [module.rank for module in self.modules.values()]
        return max([*ranks, *(part.rank for part in self.parts)], default=0)

    @property
    def target_modules(self) -> list[str]:
        """Distinct last parts of the names of all modules the adapter changes, sorted."""
        names = {*self.modules, *(part.module for part in self.parts if part.module)}
        return sorted({name.rpartition(".")[2] for name in names})

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's files."""
        return sum(state.nbytes for state in self.states.values())

    def form(self, layout: ModelLayout, itemsize: int) -> PackedForm:
        """Where everything lies once packed, for the layout the spec was read for."""
        ranks = {name: module.rank for name, module in self.modules.items()}
        return plan_form(ranks, layout, itemsize, {part.name: part.shape for part in self.parts})

    def is_current(self) -> bool:
        """Whether the files are still those the spec was read from."""
        return self.states == file_states(self.directory, self.allow_pickles)


def read_spec(
    directory: Path,
    layout: ModelLayout,
    base: BaseWeights | None = None,
    allow_pickles: bool = False,
    differing: Differing | None = None,
) -> AdapterSpec:
    """Reads config and headers, and no weights but for what `differing` reads.

    `base`: for adapters whose result depends on it; None refuses them. `differing`: see
    `vocabulary_parts`. Raises AdapterUnservable with a sentence naming the field, tensor or module
    at fault.
    """
    states = file_states(directory, allow_pickles)
    try:
        config = parse_config(_content(directory / CONFIG_FILE, MAX_CONFIG_BYTES))
        tensors = read_tensors(directory, states)
    except OSError as error:
        raise unreadable(error) from None
    if not tensors:
        raise AdapterUnservable(f"{list(states)[1]} holds no tensors.")
    linear, vocabulary = _split(tensors)
    linears = read_linears(linear, config, layout, base)
    parts, num_tokens = vocabulary_parts(vocabulary, config, layout.vocabulary, differing)
    if not linears.modules and not parts:
        raise AdapterUnservable("The adapter's files hold no LoRA weights.")
    return AdapterSpec(
        directory, states, linears.modules, (*linears.parts, *parts), allow_pickles, num_tokens
    )


def file_states(directory: Path, allow_pickles: bool = False) -> dict[str, FileState]:
    """The states of the adapter's files. Raises AdapterUnservable when one is missing."""
    try:
        present = os.listdir(directory)
    except OSError:
        raise AdapterUnservable("The adapter's folder cannot be read.") from None
    return {name: _state(directory, name) for name in adapter_files(present, allow_pickles)}


def digest_files(spec: AdapterSpec, progress: Callable[[int], None]) -> str:
    """sha256 of the adapter's files, in hex; `progress` gets the bytes done so far.

    Raises AdapterUnservable when a file cannot be read any more.
    """
    digest, done = hashlib.sha256(), 0
    chunk = memoryview(bytearray(_HASH_CHUNK_BYTES))
    try:
        for name in spec.states:
            with (spec.directory / name).open("rb") as file:
                while count := file.readinto(chunk):
                    digest.update(chunk[:count])
                    done += count
                    progress(done)
    except OSError as error:
        raise unreadable(error) from None
    return digest.hexdigest()


def _content(path: Path, limit: int) -> bytes:
    """A file, or enough of it to see that it is too large."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def read_tensors(directory: Path, present: Iterable[str]) -> dict[str, TensorRef]:
    """Every tensor by name, of an adapter's files in the order `adapter_files` gives them.

    Raises AdapterUnservable, and OSError when a file cannot be read.
    """
    files = list(present)
    if files[1] in PICKLE_FILES:
        return read_pickled_header(directory / files[1])
    if files[1] == WEIGHTS_FILE:
        return read_header(directory / WEIGHTS_FILE)
    index = parse_index(_content(directory / INDEX_FILE, MAX_INDEX_BYTES))
    tensors: dict[str, TensorRef] = {}
    for name in sorted(set(index.values())):
        if name not in files:
            raise AdapterUnservable(f"The adapter has no {name}, which {INDEX_FILE} names.")
        header = read_header(directory / name)
        if header.keys() != {tensor for tensor, file in index.items() if file == name}:
            raise AdapterUnservable(f"{name} holds other tensors than {INDEX_FILE} says.")
        tensors |= header
    return tensors


def unreadable(error: OSError) -> AdapterUnservable:
    """The refusal for a file the system does not let us read."""
    name = os.path.basename(str(error.filename or WEIGHTS_FILE))
    return AdapterUnservable(f"{name} cannot be read: {error.strerror or 'input/output error'}.")


def _state(directory: Path, name: str) -> FileState:
    try:
        found = (directory / name).stat()
    except (OSError, ValueError):
        raise AdapterUnservable(f"{name} cannot be read.") from None
    if not stat.S_ISREG(found.st_mode):
        raise AdapterUnservable(f"{name} is not a regular file.")
    check_size(name, found.st_size)
    return FileState(found.st_ino, found.st_size, found.st_mtime_ns)


def _split(
    tensors: dict[str, TensorRef],
) -> tuple[dict[str, TensorRef], dict[str, TensorRef]]:
    """Tensors of linear layers by full name, and the vocabulary's without peft's prefix."""
    linear: dict[str, TensorRef] = {}
    vocabulary: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        inner = vocabulary_name(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if inner is None:
            linear[name] = tensor
        elif inner in vocabulary:
            raise AdapterUnservable(f"{inner} is there twice, under different names.")
        else:
            vocabulary[inner] = tensor
    return linear, vocabulary
