"""An adapter's directory, read as far as its headers: AdapterSpec, or the reason it is refused."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.layout import ModelLayout, TargetModule
from lorafleet.cache.packed_form import PackedForm, plan_form
from lorafleet.cache.parts import PartSpec
from lorafleet.cache.peft_config import CONFIG_FILE, MAX_CONFIG_BYTES, PeftConfig, parse_config
from lorafleet.cache.safetensors_file import TensorRef, read_header
from lorafleet.cache.tokenizer_files import MAX_TOKENIZER_BYTES, check_size
from lorafleet.cache.vocabulary_parts import Differing, is_vocabulary, vocabulary_parts

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_PICKLE_FILE = "adapter_model.bin"
_DTYPES = ("F32", "F16", "BF16", "F64")
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileState:
    """Tells whether a file is still the one that was read."""

    inode: int
    nbytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module's adapter: A [rank, in_features], B [out_features, rank], factor on B(A(x))."""

    target: TargetModule
    rank: int
    scale: float
    a: TensorRef
    b: TensorRef


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter that can be served on the layout it was read for."""

    directory: Path
    states: dict[str, FileState]  # of its files, by name, when they were read
    modules: dict[str, ModuleSpec]  # by full module name
    parts: tuple[PartSpec, ...] = ()
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
        return self.states == file_states(self.directory)


def read_spec(
    directory: Path, layout: ModelLayout, differing: Differing | None = None
) -> AdapterSpec:
    """Reads config and headers, and no weights but for what `differing` reads.

    `differing`: see `vocabulary_parts`.
    Raises AdapterUnservable with a sentence naming the field, tensor or module at fault.
    """
    states = file_states(directory)
    try:
        with (directory / CONFIG_FILE).open("rb") as file:
            config = parse_config(file.read(MAX_CONFIG_BYTES + 1))
        tensors = read_header(directory / WEIGHTS_FILE)
    except OSError as error:
        raise unreadable(error) from None
    linear, vocabulary = _split(tensors)
    modules = _modules(_pairs(linear), config, layout)
    parts, num_tokens = vocabulary_parts(vocabulary, config, layout.vocabulary, differing)
    return AdapterSpec(directory, states, modules, parts, num_tokens)


def file_states(directory: Path) -> dict[str, FileState]:
    """The state of config, weights and what there is of a tokenizer.

    Raises AdapterUnservable when config or weights are missing.
    """
    tokenizer = [name for name in MAX_TOKENIZER_BYTES if os.path.lexists(directory / name)]
    return {name: _state(directory, name) for name in (CONFIG_FILE, WEIGHTS_FILE, *tokenizer)}


def digest_files(spec: AdapterSpec, progress: Callable[[int], None]) -> str:
    """sha256 of the adapter's files, in hex; `progress` gets the bytes done so far.

    Raises AdapterUnservable when a file cannot be read any more.
    """
    digest, done = hashlib.sha256(), 0
    try:
        for name in spec.states:
            with (spec.directory / name).open("rb") as file:
                while chunk := file.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    progress(done)
    except OSError as error:
        raise unreadable(error) from None
    return digest.hexdigest()


def unreadable(error: OSError) -> AdapterUnservable:
    """The refusal for a file the system does not let us read."""
    name = os.path.basename(str(error.filename or WEIGHTS_FILE))
    return AdapterUnservable(f"{name} cannot be read: {error.strerror or 'input/output error'}.")


def _state(directory: Path, name: str) -> FileState:
    try:
        found = (directory / name).stat()
    except FileNotFoundError:
        if name == WEIGHTS_FILE and os.path.exists(directory / _PICKLE_FILE):
            raise AdapterUnservable(
                f"The adapter has {_PICKLE_FILE} and no {WEIGHTS_FILE}: pickled weights are never "
                "loaded; save it again as safetensors."
            ) from None
        raise AdapterUnservable(f"The adapter has no {name}.") from None
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
    if not tensors:
        raise AdapterUnservable(f"{WEIGHTS_FILE} holds no tensors.")
    linear, vocabulary = {}, {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(_PREFIX)
        if name.startswith(_PREFIX) and is_vocabulary(inner):
            vocabulary[inner] = tensor
        else:
            linear[name] = tensor
    return linear, vocabulary


def _pairs(tensors: dict[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Module name -> its tensors under "A" and "B"."""
    pairs: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), "")
        if not name.startswith(_PREFIX) or not suffix:
            raise AdapterUnservable(
                f"The tensor {shown(name)} is not a LoRA weight of a linear layer; only "
                "base_model.model.<module>.lora_A.weight and .lora_B.weight are served."
            )
        module = name.removeprefix(_PREFIX).removesuffix(suffix)
        pairs.setdefault(module, {})[_SUFFIXES[suffix]] = tensor
    return pairs


def _modules(
    pairs: dict[str, dict[str, TensorRef]], config: PeftConfig, layout: ModelLayout
) -> dict[str, ModuleSpec]:
    targets = layout.targets()
    modules = {}
    for name, pair in pairs.items():
        if name not in targets:
            raise AdapterUnservable(
                f"The adapter changes the module {shown(name)}, which is not among the adaptable "
                f"linear layers of {layout.model_id}; it was made for {shown(config.base_model)}."
            )
        modules[name] = _module(targets[name], pair, config, layout)
    return modules


def _module(
    target: TargetModule, pair: dict[str, TensorRef], config: PeftConfig, layout: ModelLayout
) -> ModuleSpec:
    for side, other in ("AB", "BA"):
        if side not in pair:
            raise AdapterUnservable(f"{target.name} has lora_{other} and no lora_{side}.")
        if pair[side].dtype not in _DTYPES:
            raise AdapterUnservable(
                f"lora_{side} of {target.name} is {pair[side].dtype}; it must be one of "
                f"{', '.join(_DTYPES)}."
            )
    rank = config.rank_of(target.name)
    _check_shape(target, "A", pair["A"], (rank, target.in_features), config, layout)
    _check_shape(target, "B", pair["B"], (target.out_features, rank), config, layout)
    return ModuleSpec(target, rank, config.scale_of(target.name), pair["A"], pair["B"])


def _check_shape(
    target: TargetModule,
    side: str,
    tensor: TensorRef,
    wanted: tuple[int, int],
    config: PeftConfig,
    layout: ModelLayout,
) -> None:
    if tensor.shape != wanted:
        raise AdapterUnservable(
            f"lora_{side} of {target.name} has shape {list(tensor.shape)}; with the config's rank "
            f"it must be {list(wanted)} on {layout.model_id}; the adapter was made for "
            f"{shown(config.base_model)}."
        )
