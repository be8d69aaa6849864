"""/v1/chat/completions: its fields, choices and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from json import dumps
from typing import Any

from lorafleet.proto.messages import ShardInfo
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.body import to_json
from lorafleet.router.config import RouterConfig
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields
from lorafleet.router.openai import Choice, OpenAiCall, OpenAiWriter, quoted, read_call
from lorafleet.router.prompt import max_total_tokens
from lorafleet.router.sampling import MAX_TOP_LOGPROBS
from lorafleet.router.text import Token
from lorafleet.router.tokenizer import Tokenizer


def read_chat_call(
    fields: Fields,
    headers: Mapping[str, str],
    config: RouterConfig,
    info: ShardInfo,
    names: AdapterNames,
) -> OpenAiCall:
    """Checks a body but for its messages. Raises InvalidRequest."""
    logprobs = fields.boolean("logprobs")
    num_top_logprobs = fields.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if num_top_logprobs and not logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
    return read_call(
        fields,
        headers,
        config,
        names,
        info.model_id,
        default_max_tokens=None,
        max_new_tokens=max_total_tokens(info),
        best_of=fields.integer("n", 1, 1, config.max_best_of),
        logprobs=logprobs,
        num_top_logprobs=num_top_logprobs,
        prompt_logprobs=False,
    )


class ChatWriter(OpenAiWriter):
    """Choices as chat completion objects and chunks."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, call: OpenAiCall, tokenizer: Tokenizer) -> None:
        super().__init__(call)
        self._tokenizer = tokenizer

    def opening(self, choice: Choice) -> str:
        """The role, once."""
        return self._delta(choice, '{"role":"assistant","content":""}', "null")

    def delta(self, choice: Choice, token: Token) -> str:
        """New text, or log-probabilities of a token whose text is still held."""
        reports = self._reports(token)
        if not token.text and not reports:
            return ""
        logprobs = to_json(self._logprobs([token])) if reports else "null"
        return self._delta(choice, f'{{"content":{dumps(token.text)}}}', logprobs)

    def closing(self, choice: Choice) -> str:
        """The finish reason."""
        return self._delta(choice, "{}", "null", choice.finish_reason)

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The message."""
        reported = [token for token in choice.completion.tokens if self._reports(token)]
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.completion.text, "refusal": None},
            "logprobs": self._logprobs(reported) if self.call.logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _delta(self, choice: Choice, delta: str, logprobs: str, finish: str | None = None) -> str:
        return self._chunk(
            f'{{"index":{choice.index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{quoted(finish)}}}'
        )

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        content = [
            self._entry(token.event.token_id, token.event.logprob)
            | {"top_logprobs": [self._entry(*alternative) for alternative in token.event.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.pieces[token_id]),
        }
