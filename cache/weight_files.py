"""Which files an adapter is made of: its config, weights in one of the forms peft writes, and what
there is of a tokenizer.

One safetensors file; or several with an index that says which tensor is in which; or, where the
operator allows it, one file of torch's pickles.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.strict_json import read_object
from lorafleet.cache.tokenizer_files import MAX_TOKENIZER_BYTES

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")
MAX_INDEX_BYTES = 16 << 20

_PART = re.compile(r"adapter_model-[A-Za-z0-9._-]+\.safetensors")
_MAX_PARTS = 1000


def adapter_files(
    present: Collection[str], allow_pickles: bool = False, adapter: str = "The adapter"
) -> tuple[str, ...]:
    """The adapter's files among those of its folder: config, weights or their index, the rest.

    `adapter`: as the sentence calls it. Raises AdapterUnservable when there is no adapter.
    """
    if CONFIG_FILE not in present:
        raise AdapterUnservable(f"{adapter} has no {CONFIG_FILE}.")
    weights = _weight_files(present, allow_pickles, adapter)
    return CONFIG_FILE, *weights, *(name for name in MAX_TOKENIZER_BYTES if name in present)


def _weight_files(present: Collection[str], allow_pickles: bool, adapter: str) -> tuple[str, ...]:
    if WEIGHTS_FILE in present:
        return (WEIGHTS_FILE,)
    if INDEX_FILE in present:
        parts = sorted(name for name in present if _PART.fullmatch(name))
        check_number_of_parts(len(parts), adapter)
        return INDEX_FILE, *parts
    pickle = next((name for name in PICKLE_FILES if name in present), None)
    if pickle is None:
        raise AdapterUnservable(f"{adapter} has no {WEIGHTS_FILE}.")
    if not allow_pickles:
        raise AdapterUnservable(
            f"{adapter} has {pickle} and no {WEIGHTS_FILE}: pickled weights are loaded only with "
            "--allow-pickled-adapters; save it again as safetensors."
        )
    return (pickle,)


def check_number_of_parts(count: int, adapter: str) -> None:
    """Raises AdapterUnservable for more files of weights than an adapter has."""
    if count > _MAX_PARTS:
        raise AdapterUnservable(f"{adapter} has more than {_MAX_PARTS} files of weights.")


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name can be one of an adapter's."""
    named = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, *PICKLE_FILES, *MAX_TOKENIZER_BYTES)
    return name in named or bool(_PART.fullmatch(name))


def parse_index(data: bytes) -> dict[str, str]:
    """Tensor name -> file. Raises AdapterUnservable for an index that is none."""
    if len(data) > MAX_INDEX_BYTES:
        raise AdapterUnservable(f"{INDEX_FILE} is larger than {MAX_INDEX_BYTES} bytes.")
    files = read_object(INDEX_FILE, data).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise AdapterUnservable(f"{INDEX_FILE} has no weight_map of tensors to files.")
    for name in files.values():
        if not _PART.fullmatch(name):
            raise AdapterUnservable(
                f"{INDEX_FILE} names the file {shown(name)}; it must be one such as "
                "adapter_model-00001-of-00002.safetensors."
            )
    return files
