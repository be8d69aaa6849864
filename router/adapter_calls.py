"""What the adapter routes are asked, checked; no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields, refusal
from lorafleet.router.merged_adapters import read_merge
from lorafleet.router.prompt import BASE_MODEL, MAX_ID_LENGTH, is_id, read_adapter

D = TypeVar("D")

_TIERS = {"disk": Tier.DISK, "host": Tier.HOST, "device": Tier.DEVICE}
_PINS = {"none": Tier.NONE, "host": Tier.HOST, "device": Tier.DEVICE}


@dataclass(frozen=True, slots=True)
class LoadCall:
    """POST /v1/adapters."""

    key: AdapterKey
    tier: Tier  # to load to, at least
    pin: Tier | None  # None = as it is, NONE = no pin
    alias: str  # "" = none
    reload: bool  # what the source has now, whatever is held
    api_token: str = field(repr=False)


def read_load_call(fields: Fields, names: AdapterNames, model_id: str) -> LoadCall:
    """Checks a body. Raises InvalidRequest."""
    alias = fields.string("alias", "")
    return LoadCall(
        key=_read_key_or_merge(fields, names),
        tier=_choice(fields, "tier", _TIERS, Tier.HOST),
        pin=_choice(fields, "pin", _PINS, None),
        alias=check_alias("alias", alias, model_id) if alias else "",
        reload=fields.boolean("reload"),
        api_token=fields.string("api_token", ""),
    )


def _read_key_or_merge(fields: Fields, names: AdapterNames) -> AdapterKey:
    merge = None if fields.has("adapter_id") else read_merge(fields, names)
    return merge or read_key(fields, "adapter_id", names)


def read_key(fields: Fields, name: str, names: AdapterNames) -> AdapterKey:
    """The adapter a field names, with `adapter_source` and `revision`. Raises InvalidRequest."""
    fields.required(name)
    revision = fields.string("revision", "")
    # With a revision the id is an id.
    found = read_adapter(
        fields.string(name, ""), name, fields, names.without_aliases() if revision else names
    )
    if found is None:
        raise InvalidRequest(f"`{name}` must name an adapter, not the base model", name)
    if len(revision) > MAX_ID_LENGTH or (revision and not revision.isprintable()):
        wanted = f"at most {MAX_ID_LENGTH} printable characters"
        raise refusal("revision", wanted, revision)
    return replace(found, revision=revision) if revision else found


def check_alias(name: str, alias: str, model_id: str) -> str:
    """A name that may become an alias. Raises InvalidRequest."""
    if not is_id(alias):
        raise refusal(name, f"at most {MAX_ID_LENGTH} printable characters", alias)
    if alias in (model_id, BASE_MODEL):
        raise InvalidRequest(f"`{name}` must not be a name of the base model", name)
    return alias


def _choice(fields: Fields, name: str, choices: dict[str, Tier], default: D) -> Tier | D:
    value = fields.string(name, "").lower()
    if not value:
        return default
    if value not in choices:
        raise refusal(name, f"one of {', '.join(choices)}", value)
    return choices[value]
