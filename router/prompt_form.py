"""PromptForm: how requests to the base model, or to one adapter, become tokens and text again."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lorafleet.cache.tokenizer_files import is_same_tokenizer
from lorafleet.proto.messages import AdapterTokenizer, ShardInfo
from lorafleet.router.chat import ChatTemplate, special_tokens, template_source
from lorafleet.router.errors import AdapterUnservable
from lorafleet.router.tokenizer import Tokenizer

Render = Callable[[list[dict[str, Any]]], Awaitable[str]]

_MAX_REGEX_LENGTH = 2048
_SLOW_REGEX = re.compile(r"\)[*+{]|\\[1-9k]")  # a repeated group, or one that is referred to


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
        self._file = info.tokenizer_json
        self._config = json.loads(info.tokenizer_config_json or b"{}")
        tokenizer, template = Tokenizer(self._file, num_threads), ChatTemplate(self._config)

        async def render(messages: list[dict[str, Any]]) -> str:
            return await tokenizer.in_thread(template.render, messages)

        self.form = PromptForm(tokenizer, render, frozenset(info.eos_token_ids))

    def adapted(
        self,
        files: AdapterTokenizer,
        threads: ThreadPoolExecutor,
        render: Callable[[dict[str, Any], list[dict[str, Any]]], Awaitable[str]],
    ) -> PromptForm:
        """The form with what an adapter ships of its own; takes long, so call it in a thread.

        Raises AdapterUnservable for a tokenizer that is none, or whose regular expressions could
        take very long.
        """
        config = json.loads(files.tokenizer_config_json or b"{}")
        tokenizer, nbytes = self.form.tokenizer, 0
        if files.tokenizer_json and not is_same_tokenizer(files.tokenizer_json, self._file):
            tokenizer = open_tokenizer(files.tokenizer_json, self._file, threads)
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


def open_tokenizer(data: bytes, base: bytes, threads: int | ThreadPoolExecutor) -> Tokenizer:
    """The tokenizer an adapter ships, `base` being the base model's file.

    Raises AdapterUnservable.
    """
    known = set(_regexes(json.loads(base)))
    for regex in set(_regexes(json.loads(data))) - known:
        if len(regex) > _MAX_REGEX_LENGTH or _SLOW_REGEX.search(regex):
            raise AdapterUnservable(
                "the adapter's tokenizer.json has a regular expression that the base model's has "
                f"not and that could take very long: {regex[:120]!r}"
            )
    try:
        return Tokenizer(data, threads)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        raise AdapterUnservable(
            f"the adapter's tokenizer.json is not a tokenizer: {str(error)[:200]}"
        ) from None


def _regexes(node: Any) -> Iterator[str]:
    """Every regular expression of a tokenizer's file, however it nests."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(regex := node.get("Regex"), str):
                yield regex
            stack += [value for name, value in node.items() if name != "vocab"]
        elif isinstance(node, list) and not (node and isinstance(node[0], str)):
            stack += node
