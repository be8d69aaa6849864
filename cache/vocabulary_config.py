"""What of adapter_config.json says how an adapter changes the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafleet.cache.errors import AdapterUnservable, shown

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"  # full module names
_SERVED = "only embed_tokens and lm_head are served"


@dataclass(frozen=True, slots=True)
class VocabularyConfig:
    """`saved`: modules the adapter has copies of its own of, whatever they share in the base.

    `token_ids`: module -> the tokens whose weights are replaced, in the order of their rows.
    """

    saved: frozenset[str]
    token_ids: dict[str, tuple[int, ...]]
    ensures_tying: bool


def parse_vocabulary(config: dict[str, Any]) -> VocabularyConfig:
    """Raises AdapterUnservable, naming the field and the module or token at fault."""
    tying = config.get("ensure_weight_tying")
    if tying is not None and type(tying) is not bool:
        raise AdapterUnservable(f"ensure_weight_tying is {shown(tying)}; it must be true or false.")
    return VocabularyConfig(_saved(config), _token_ids(config), bool(tying))


def _saved(config: dict[str, Any]) -> frozenset[str]:
    names = config.get("modules_to_save") or []
    if not isinstance(names, list):
        raise AdapterUnservable(f"modules_to_save is {shown(names)}; it must be a list of names.")
    saved: set[str] = set()
    for name in names:
        # peft takes the end of a module's name, wherever that begins.
        found = [
            m for m in (EMBEDDING, HEAD) if isinstance(name, str) and name and m.endswith(name)
        ]
        if not found:
            raise AdapterUnservable(f"modules_to_save has {shown(name)}; {_SERVED}.")
        saved.update(found)
    return frozenset(saved)


def _token_ids(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    value = config.get("trainable_token_indices") or {}
    by_name = {"embed_tokens": value} if isinstance(value, list) else value
    if not isinstance(by_name, dict):
        raise AdapterUnservable(
            f"trainable_token_indices is {shown(value)}; it must be a list of token ids, or one "
            "for each module."
        )
    found = {}
    for name, ids in by_name.items():
        module = {"embed_tokens": EMBEDDING, EMBEDDING: EMBEDDING, HEAD: HEAD}.get(name)
        if module is None:
            raise AdapterUnservable(f"trainable_token_indices has {shown(name)}; {_SERVED}.")
        found[module] = _ids(ids)
    return {module: ids for module, ids in found.items() if ids}


def _ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise AdapterUnservable(
            f"trainable_token_indices holds {shown(ids)}; it must hold lists of token ids."
        )
    if len(set(ids)) < len(ids):
        raise AdapterUnservable("trainable_token_indices names a token twice.")
    return tuple(ids)
