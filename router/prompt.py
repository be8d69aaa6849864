"""Prompts within their limits, and the adapter a request names."""

from __future__ import annotations

from collections.abc import Mapping

from lorafleet.cache.merging import recipe
from lorafleet.proto.messages import AdapterKey, ShardInfo
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.config import RouterConfig
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields, refusal

BASE_MODEL = "__base_model__"  # LoRAX's name for no adapter
SOURCES = ("local", "hub", "s3", "http", recipe.SOURCE)
MAX_ID_LENGTH = 512
_CHARACTERS_A_TOKEN = 16  # tokens of today's vocabularies have about four
# What people write where an OpenAI client insists on a key.
_PLACEHOLDER_KEYS = frozenset(
    ("", "-", "empty", "none", "null", "dummy", "no-key", "sk-no-key-required")
)


class PromptTooLong(InvalidRequest):
    """Prompt and completion do not fit."""

    code = "context_length_exceeded"


def max_total_tokens(info: ShardInfo) -> int:
    """Tokens a sequence may have: what the model takes and the KV cache holds.

    The last token is never computed on, so it takes no place in the cache.
    """
    return min(info.max_model_len, info.num_pages * info.page_size + 1)


def max_prompt_tokens(config: RouterConfig, info: ShardInfo) -> int:
    """Tokens a prompt may have; one is left to generate."""
    limit = max_total_tokens(info) - 1
    return min(config.max_input_length, limit) if config.max_input_length else limit


def max_characters(info: ShardInfo) -> int:
    """Characters a text may have that is to be the longest sequence: many for each token."""
    return _CHARACTERS_A_TOKEN * max_total_tokens(info)


def fit(
    num_prompt: int,
    max_new: int | None,
    config: RouterConfig,
    info: ShardInfo,
    *,
    prompt_field: str,
    max_new_field: str,
) -> int:
    """Tokens to generate: `max_new`, or all that fit. Raises PromptTooLong with the limits."""
    limit, total = max_prompt_tokens(config, info), max_total_tokens(info)
    if num_prompt == 0:
        raise InvalidRequest(f"`{prompt_field}` must have at least 1 token", prompt_field)
    if num_prompt > limit:
        raise PromptTooLong(
            f"`{prompt_field}` must have at most {limit} tokens, got {num_prompt}", prompt_field
        )
    if max_new is None:
        return total - num_prompt
    if num_prompt + max_new > total:
        raise PromptTooLong(
            f"`{prompt_field}` tokens and `{max_new_field}` together must be at most"
            f" {total}, got {num_prompt} and {max_new}",
            prompt_field,
        )
    return max_new


def is_id(text: str) -> bool:
    """Whether this may be an adapter's id or an alias."""
    return 0 < len(text) <= MAX_ID_LENGTH and text.isprintable()


def read_adapter(
    adapter_id: str, id_field: str, fields: Fields, names: AdapterNames
) -> AdapterKey | None:
    """The adapter named by `adapter_id` and `adapter_source`; None = the base model.

    An alias is looked at only where no source is named, so an id can always be said in full.
    A hub's id may have its revision: `owner/name@revision`. A local one is a path under the
    adapter root. A merged adapter's id is its recipe. Raises InvalidRequest.
    """
    source = fields.string("adapter_source", "").lower() or names.default_source
    if source not in SOURCES:
        raise refusal("adapter_source", f"one of {', '.join(SOURCES)}", source)
    if adapter_id in ("", BASE_MODEL):
        return None
    if source != recipe.SOURCE and not is_id(adapter_id):
        wanted = f"at most {MAX_ID_LENGTH} printable characters"
        raise refusal(id_field, wanted, adapter_id)
    if not fields.string("adapter_source", "") and (found := names.aliases.find(adapter_id)):
        return found
    try:
        return names.key(source, adapter_id)
    except ValueError as error:
        raise InvalidRequest(f"`{id_field}`: {error}", id_field) from None


def read_api_token(fields: Fields, adapter: AdapterKey | None, headers: Mapping[str, str]) -> str:
    """The caller's token for the adapter's source: the body's, else the bearer's; "" = none.

    Only the hub has callers of its own, and a placeholder key is none.
    """
    token = fields.string("api_token", "")
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    if not token and scheme.lower() == "bearer":
        token = bearer.strip()
    asked = [] if adapter is None else [adapter, *recipe.members_of(adapter)]
    is_used = any(key.source == "hub" for key in asked)
    return token if is_used and token.lower() not in _PLACEHOLDER_KEYS else ""
