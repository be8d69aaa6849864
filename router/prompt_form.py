"""PromptForm: how requests to the base model, or to one adapter, become tokens and text again."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lorafleet.proto.messages import AdapterTokenizer, ShardInfo
from lorafleet.router.chat import ChatTemplate, special_tokens, template_source
from lorafleet.router.errors import AdapterUnservable
from lorafleet.router.prompt import max_characters
from lorafleet.router.tokenizer import Tokenizer
from lorafleet.router.tokenizer_check import check_tokenizer, read_tokenizer_file

Render = Callable[[list[dict[str, Any]]], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class PromptForm:
    """A tokenizer, a chat template and the tokens that end a text."""

    tokenizer: Tokenizer
    render: Render
    eos_token_ids: frozenset[int]
    nbytes: int = 0  # of the tokenizer file it holds beside the base's


class BaseForm:
    """The base model's form, and what adapters' files are compared with."""

    def __init__(self, info: ShardInfo, num_threads: int) -> None:
        self.tokenizer_json = info.tokenizer_json
        self._max_characters = max_characters(info)
        self._config = json.loads(info.tokenizer_config_json or b"{}")
        tokenizer = Tokenizer(self.tokenizer_json, num_threads)
        template = ChatTemplate(self._config)

        async def render(messages: list[dict[str, Any]]) -> str:
            return await tokenizer.in_thread(template.render, messages)

        self.form = PromptForm(tokenizer, render, frozenset(info.eos_token_ids))

    def adapted(
        self,
        files: AdapterTokenizer,
        has_bases: bool,
        threads: ThreadPoolExecutor,
        render: Callable[[dict[str, Any], list[dict[str, Any]]], Awaitable[str]],
    ) -> PromptForm:
        """The form with what an adapter ships of its own; takes long, so call it in a thread.

        `has_bases`: whether its tokenizer is the base's; another was found harmless before. Raises
        AdapterUnservable for one that is none.
        """
        config = json.loads(files.tokenizer_config_json or b"{}")
        tokenizer, nbytes = self.form.tokenizer, 0
        if not has_bases:
            tokenizer = _tokenizer(files.tokenizer_json, threads, self._max_characters)
            nbytes = len(files.tokenizer_json)
        return PromptForm(
            tokenizer, self._render(config, render), self._eos(tokenizer, config), nbytes
        )

    def _render(
        self,
        config: dict[str, Any],
        render: Callable[[dict[str, Any], list[dict[str, Any]]], Awaitable[str]],
    ) -> Render:
        """The base's unless the adapter has a template, which is rendered where it does no harm."""
        source = template_source(config.get("chat_template"))
        base = special_tokens(self._config)
        own = {"chat_template": source, **(special_tokens(config) or base)}
        ours = {"chat_template": template_source(self._config.get("chat_template")), **base}
        if not source or own == ours:
            return self.form.render
        return lambda messages: render(own, messages)

    def _eos(self, tokenizer: Tokenizer, config: dict[str, Any]) -> frozenset[int]:
        """The base's, and the adapter's own end of text where that is another."""
        own = tokenizer.token_id(special_tokens(config).get("eos_token", ""))
        return self.form.eos_token_ids | ({own} if own is not None else set())


def open_tokenizer(data: bytes, base: bytes, threads: int) -> Tokenizer:
    """The tokenizer an adapter ships, `base` being the base model's file.

    Raises AdapterUnservable.
    """
    check_tokenizer(read_tokenizer_file(data), json.loads(base))
    return _tokenizer(data, threads)


def _tokenizer(
    data: bytes, threads: int | ThreadPoolExecutor, max_characters: int | None = None
) -> Tokenizer:
    try:
        return Tokenizer(data, threads, max_characters)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        raise AdapterUnservable(
            f"the adapter's tokenizer.json is not a tokenizer: {str(error)[:200]}"
        ) from None
