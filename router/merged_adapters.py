"""`merged_adapters`, LoRAX's field for an adapter made of several: the key of what it asks for."""

from __future__ import annotations

from collections.abc import Iterable

from lorafleet.cache.merging.recipe import (
    MAX_MEMBERS,
    MAX_WEIGHT,
    MIN_MEMBERS,
    MajoritySign,
    Member,
    MergeRecipe,
    Strategy,
)
from lorafleet.proto.messages import AdapterKey
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields, refusal
from lorafleet.router.prompt import read_adapter

FIELD = "merged_adapters"
IDS, WEIGHTS, DENSITY = (f"{FIELD}.{name}" for name in ("ids", "weights", "density"))


def read_adapter_or_merge(
    adapter_id: str, id_field: str, fields: Fields, names: AdapterNames
) -> AdapterKey | None:
    """The adapter that `adapter_id` or `merged_adapters` names; None = the base model.

    Raises InvalidRequest.
    """
    adapter = read_adapter(adapter_id, id_field, fields, names)
    merge = read_merge(fields, names)
    if adapter is not None and merge is not None:
        raise InvalidRequest(
            f"at most one of `{id_field}` and `{FIELD}` may name an adapter", FIELD
        )
    return merge or adapter


def read_merge(fields: Fields, names: AdapterNames) -> AdapterKey | None:
    """The key of the merge that is asked for; None when none is. Raises InvalidRequest.

    `ids` are read as `adapter_id` is, `adapter_source` included. `weights` has one for each.
    """
    asked = fields.object(FIELD)
    if asked is None:
        return None
    asked = asked.named(FIELD)
    keys = _read_ids(asked, fields, names)
    strategy = Strategy(_choice(asked, f"{FIELD}.merge_strategy", Strategy, Strategy.LINEAR))
    sign = _choice(asked, f"{FIELD}.majority_sign_method", MajoritySign, MajoritySign.TOTAL)
    weights = asked.numbers(WEIGHTS, len(keys), -MAX_WEIGHT, MAX_WEIGHT)
    density = asked.number(DENSITY, 1.0, 0.0, 1.0, above_low=strategy.prunes)
    if strategy.prunes:
        asked.required(DENSITY)
    try:
        recipe = MergeRecipe(
            tuple(Member(*pair) for pair in zip(keys, weights, strict=True)),
            strategy,
            density if strategy.prunes else 1.0,
            MajoritySign(sign) if strategy.elects else MajoritySign.TOTAL,
        )
    except ValueError as error:
        raise InvalidRequest(f"`{FIELD}`: {error}", FIELD) from None
    return recipe.key


def _read_ids(asked: Fields, fields: Fields, names: AdapterNames) -> list[AdapterKey]:
    asked.required(IDS)
    ids = asked.strings(IDS, MAX_MEMBERS)
    if len(ids) < MIN_MEMBERS:
        raise InvalidRequest(
            f"`{IDS}` must have between {MIN_MEMBERS} and {MAX_MEMBERS} adapters, got {len(ids)}",
            IDS,
        )
    found = [read_adapter(one, IDS, fields, names) for one in ids]
    keys = [key for key in found if key is not None]
    if len(keys) < len(ids):
        raise InvalidRequest(f"`{IDS}` must name adapters, not the base model", IDS)
    return keys


def _choice(fields: Fields, name: str, choices: Iterable[str], default: str) -> str:
    value = fields.string(name, "").lower() or default
    if value not in list(choices):
        raise refusal(name, f"one of {', '.join(choices)}", value)
    return value
