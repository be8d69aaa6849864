"""/v1/completions: its fields, prompts, choices and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from json import dumps
from typing import Any

from lorafleet.proto.messages import ShardInfo
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.body import to_json
from lorafleet.router.config import RouterConfig
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields, check_string, refusal
from lorafleet.router.openai import Choice, OpenAiCall, OpenAiWriter, quoted, read_call
from lorafleet.router.prompt import max_total_tokens
from lorafleet.router.sampling import MAX_TOP_LOGPROBS
from lorafleet.router.text import Token
from lorafleet.router.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_WANTED = "a string, a list of strings, a list of token ids or a list of such lists"


def read_completion_call(
    fields: Fields,
    headers: Mapping[str, str],
    config: RouterConfig,
    info: ShardInfo,
    names: AdapterNames,
) -> OpenAiCall:
    """Checks a body but for its prompts. Raises InvalidRequest."""
    fields.unsupported("suffix")
    num_top_logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    n = fields.integer("n", 1, 1, config.max_best_of)
    best_of = fields.integer("best_of", n, n, config.max_best_of)
    if best_of > n and fields.boolean("stream"):
        raise InvalidRequest("`best_of` must equal `n` when streaming", "best_of")
    return read_call(
        fields,
        headers,
        config,
        names,
        info.model_id,
        default_max_tokens=_DEFAULT_MAX_TOKENS,
        max_new_tokens=max_total_tokens(info),
        best_of=best_of,
        logprobs=num_top_logprobs is not None,
        num_top_logprobs=num_top_logprobs or 0,
        prompt_logprobs=num_top_logprobs is not None and fields.boolean("echo"),
    )


def read_prompts(fields: Fields, max_count: int) -> list[str | list[int]]:
    """The prompts as text or as token ids. Raises InvalidRequest."""
    value = fields.required("prompt")
    if isinstance(value, str):
        return [check_string("prompt", value)]
    if not isinstance(value, list) or not value:
        raise refusal("prompt", _WANTED, value)
    if isinstance(value[0], int):
        return [_token_ids(value)]
    if len(value) > max_count:
        raise refusal("prompt", f"a list of at most {max_count} prompts", value)
    return [_prompt(item) for item in value]


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list):
        return _token_ids(value)
    if not isinstance(value, str):
        raise refusal("prompt", _WANTED, value)
    return check_string("prompt", value)


def _token_ids(values: list[Any]) -> list[int]:
    for value in values:
        if type(value) is not int or value < 0:
            raise refusal("prompt", "token ids from 0 up", value)
    return values


def check_token_ids(ids: list[int], vocab_size: int) -> None:
    """Raises InvalidRequest for ids that whom they are for has not."""
    if ids and max(ids) >= vocab_size:
        raise refusal("prompt", f"token ids between 0 and {vocab_size - 1}", max(ids))


class CompletionWriter(OpenAiWriter):
    """Choices as text completion objects and chunks; `echo` puts the prompt before the text."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, call: OpenAiCall, tokenizer: Tokenizer, *, echo: bool) -> None:
        super().__init__(call)
        self._tokenizer = tokenizer
        self._echo = echo

    def opening(self, choice: Choice) -> str:
        """The prompt, when it is echoed."""
        if not self._echo:
            return ""
        logprobs = to_json(self._prompt_logprobs(choice)) if self.call.logprobs else "null"
        return self._text(choice, choice.prompt_text, logprobs)

    def delta(self, choice: Choice, token: Token) -> str:
        """New text, or log-probabilities of a token whose text is still held."""
        reports = self._reports(token)
        if not token.text and not reports:
            return ""
        logprobs = to_json(self._logprobs(choice, [token])) if reports else "null"
        return self._text(choice, token.text, logprobs)

    def closing(self, choice: Choice) -> str:
        """The finish reason."""
        return self._text(choice, "", "null", choice.finish_reason)

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The text, with its prompt when echoed."""
        return {
            "index": choice.index,
            "text": (choice.prompt_text if self._echo else "") + choice.completion.text,
            "logprobs": self._whole_logprobs(choice) if self.call.logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _text(self, choice: Choice, text: str, logprobs: str, finish: str | None = None) -> str:
        return self._chunk(
            f'{{"index":{choice.index},"text":{dumps(text)},"logprobs":{logprobs},'
            f'"finish_reason":{quoted(finish)}}}'
        )

    def _whole_logprobs(self, choice: Choice) -> dict[str, Any]:
        prompt = self._prompt_logprobs(choice) if self._echo else _no_logprobs()
        reported = [token for token in choice.completion.tokens if self._reports(token)]
        generated = self._logprobs(choice, reported)
        return {name: prompt[name] + generated[name] for name in prompt}

    def _prompt_logprobs(self, choice: Choice) -> dict[str, list[Any]]:
        """The echoed prompt's; the first token has none, and none has alternatives."""
        found = _no_logprobs()
        logprobs = [None, *choice.generation.prompt_logprobs]
        for token_id, logprob in zip(choice.request.prompt_ids, logprobs, strict=True):
            self._add(found, choice, token_id, logprob, None)
        return found

    def _logprobs(self, choice: Choice, tokens: list[Token]) -> dict[str, list[Any]]:
        found = _no_logprobs()
        for token in tokens:
            event = token.event
            top = {self._tokenizer.token_text(id): logprob for id, logprob in event.top}
            chosen = self._tokenizer.token_text(event.token_id)
            top.setdefault(chosen, event.logprob)
            self._add(found, choice, event.token_id, event.logprob, top)
        return found

    def _add(
        self,
        found: dict[str, list[Any]],
        choice: Choice,
        token_id: int,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> None:
        text = self._tokenizer.token_text(token_id)
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(top)
        found["text_offset"].append(choice.text_offset)
        if token_id not in self._tokenizer.special_ids:
            choice.text_offset += len(text)


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
