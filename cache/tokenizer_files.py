"""The tokenizer and chat template an adapter may ship beside its weights.

transformers writes them into an adapter's folder when it saves its tokenizer there. They are handed
to the router as they are; what it makes of them is its business.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.strict_json import check_containers

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_FILE = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"

# The most bytes each may have; the largest vocabularies of today take about 35 MB.
MAX_TOKENIZER_BYTES = {
    TOKENIZER_FILE: 64 << 20,
    _CONFIG_FILE: 8 << 20,
    _SPECIAL_FILE: 1 << 20,
    _TEMPLATE_FILE: 1 << 20,
}
# Of lists, objects and what they hold; Gemma's tokenizer, the largest of today, has two million.
_MAX_VALUES = 3_000_000

# What of a tokenizer's file says nothing of how text becomes tokens.
_IGNORED = ("version", "truncation", "padding")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What was found, and a digest of it; all empty where the adapter ships nothing."""

    digest: str = ""
    tokenizer_json: bytes = field(default=b"", repr=False)
    config_json: bytes = field(default=b"", repr=False)  # the template put back inside


def check_size(name: str, nbytes: int) -> None:
    """Raises AdapterUnservable for a tokenizer's file that is larger than any is."""
    limit = MAX_TOKENIZER_BYTES.get(name)
    if limit is not None and nbytes > limit:
        raise AdapterUnservable(f"{name} has {nbytes} bytes; it may have {limit}.")


def check_values(name: str, data: bytes) -> None:
    """Raises AdapterUnservable for a file that takes very much memory, before it is parsed."""
    check_containers(name, data)
    count = data.count(b",") + data.count(b"[") + data.count(b"{")
    if count > _MAX_VALUES:
        raise AdapterUnservable(f"{name} has {count} values; it may have {_MAX_VALUES}.")


def is_same_tokenizer(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two parsed `tokenizer.json` make the same tokens of a text."""
    return _essence(one) == _essence(other)


def _essence(file: dict[str, Any]) -> dict[str, Any]:
    essence = {name: value for name, value in file.items() if name not in _IGNORED}
    if isinstance(file.get("model"), dict):
        essence["model"] = {
            name: _merges(value) if name == "merges" else value
            for name, value in file["model"].items()
            if (name, value) != ("ignore_merges", False)  # as without it
        }
    return essence


def _merges(merges: Any) -> Any:
    """Pairs as `tokenizers` wrote them until 0.20: "a b" for what is ["a", "b"] since."""
    if not isinstance(merges, list):
        return merges
    return [" ".join(pair) if _is_pair(pair) else pair for pair in merges]


def _is_pair(pair: Any) -> bool:
    # A space inside would make two pairs look the same.
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(piece, str) and " " not in piece for piece in pair)
    )


def parse_tokenizer(data: bytes) -> dict[str, Any]:
    """A `tokenizer.json`, in a second and with the interpreter's lock held.

    Raises AdapterUnservable for what is none.
    """
    return _object(TOKENIZER_FILE, {TOKENIZER_FILE: data})


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """The files as they are; `tokenizer.json` is not parsed, since streams would wait for that.

    Raises AdapterUnservable naming a file that is too large or is not what it should be.
    """
    contents = {name: _read(directory / name) for name in MAX_TOKENIZER_BYTES}
    if not any(contents.values()):
        return TokenizerFiles()
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    config = _object(_CONFIG_FILE, contents)
    for name, token in _object(_SPECIAL_FILE, contents).items():
        config.setdefault(name, token)
    if contents[_TEMPLATE_FILE]:
        config["chat_template"] = _text(_TEMPLATE_FILE, contents)
    return TokenizerFiles(
        digest.hexdigest(), contents[TOKENIZER_FILE], json.dumps(config).encode() if config else b""
    )


def _read(path: Path) -> bytes:
    """The content, empty where there is no such file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TOKENIZER_BYTES[path.name] + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise AdapterUnservable(f"{path.name} cannot be read: {error.strerror}.") from None
    check_size(path.name, len(content))
    return content


def _text(name: str, contents: dict[str, bytes]) -> str:
    try:
        return contents[name].decode()
    except UnicodeDecodeError:
        raise AdapterUnservable(f"{name} is not UTF-8.") from None


def _object(name: str, contents: dict[str, bytes]) -> dict[str, Any]:
    if not contents[name]:
        return {}
    check_values(name, contents[name])
    try:
        found = json.loads(_text(name, contents))
    except (ValueError, RecursionError):
        raise AdapterUnservable(f"{name} is not valid JSON.") from None
    if not isinstance(found, dict):
        raise AdapterUnservable(f"{name} is not a JSON object.")
    return found
