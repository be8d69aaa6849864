"""What OpenAI's two generation routes share: request fields, ids, usage and stream frames."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from json import dumps
from typing import Any, ClassVar

from lorafleet.proto.messages import AdapterKey
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.body import to_json
from lorafleet.router.config import RouterConfig
from lorafleet.router.deadline import Deadline, read_deadline
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields, check_string
from lorafleet.router.generation import Generation
from lorafleet.router.merged_adapters import read_adapter_or_merge
from lorafleet.router.priority import read_priority
from lorafleet.router.prompt import read_api_token
from lorafleet.router.request import FinishReason, GenerationRequest
from lorafleet.router.sampling import Sampling, read_sampling
from lorafleet.router.text import Completion, Token

DONE = b"data: [DONE]\n\n"
_MAX_TEMPERATURE = 2.0
_UNSUPPORTED = ("tools", "functions", "logit_bias")
_FINISH_REASONS = {
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class OpenAiCall:
    """The checked fields both routes have."""

    model: str  # as the response names it
    adapter: AdapterKey | None
    sampling: Sampling
    n: int  # choices returned per prompt
    best_of: int  # sequences generated per prompt
    max_new_tokens: int | None  # None = all that fit
    max_new_field: str
    stops: list[str]
    ignore_eos: bool
    logprobs: bool
    stream: bool
    include_usage: bool
    deadline: Deadline
    priority: int
    api_token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole response; a prompt counts once however many sequences it has."""

    prompt_tokens: int
    completion_tokens: int

    def to_dict(self) -> dict[str, int]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(slots=True)
class Choice:
    """One sequence on its way to being a choice of the response."""

    index: int
    prompt_text: str
    request: GenerationRequest
    generation: Generation
    completion: Completion
    text_offset: int = 0  # characters before the next token; for completions' logprobs

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's word for the end; None before it."""
        finish = self.completion.finish
        return _FINISH_REASONS[finish] if finish else None


def read_call(
    fields: Fields,
    headers: Mapping[str, str],
    config: RouterConfig,
    names: AdapterNames,
    served_model: str,
    *,
    default_max_tokens: int | None,
    max_new_tokens: int,
    best_of: int,
    logprobs: bool,
    num_top_logprobs: int,
    prompt_logprobs: bool,
) -> OpenAiCall:
    """Checks the shared fields. Raises InvalidRequest."""
    fields.unsupported(*_UNSUPPORTED)
    _refuse_response_format(fields)
    model = check_string("model", fields.required("model"))
    adapter_id = "" if model == served_model else model
    adapter = read_adapter_or_merge(adapter_id, "model", fields, names)
    stream = fields.boolean("stream")
    max_new_field = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    options = fields.object("stream_options") or Fields({})
    return OpenAiCall(
        model=served_model if adapter is None else model,
        adapter=adapter,
        sampling=read_sampling(
            fields,
            temperature=1.0,
            max_temperature=_MAX_TEMPERATURE,
            top_k_off=True,
            num_top_logprobs=num_top_logprobs,
            prompt_logprobs=prompt_logprobs,
        ),
        n=fields.integer("n", 1, 1, config.max_best_of),
        best_of=best_of,
        max_new_tokens=fields.integer(max_new_field, default_max_tokens, 1, max_new_tokens),
        max_new_field=max_new_field,
        stops=fields.strings("stop", config.max_stop_sequences),
        ignore_eos=fields.boolean("ignore_eos_token") or fields.boolean("ignore_eos"),
        logprobs=logprobs,
        stream=stream,
        include_usage=stream and options.boolean("include_usage"),
        deadline=read_deadline(fields, config),
        priority=read_priority(fields),
        api_token=read_api_token(fields, adapter, headers),
    )


def _refuse_response_format(fields: Fields) -> None:
    response_format = fields.object("response_format")
    if response_format and response_format.raw("type") != "text":
        raise InvalidRequest(
            "`response_format` other than text is not supported yet", "response_format"
        )


class OpenAiWriter(ABC):
    """One response's frames and final object; `delta`'s fixed parts are built once."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(self, call: OpenAiCall) -> None:
        self.call = call
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "object": self.object_name,
            "created": int(time.time()),
            "model": call.model,
        }
        chunk_head = to_json(self._head | {"object": self.chunk_name})
        self._chunk_start = f'data: {chunk_head[:-1]},"choices":['
        self._chunk_end = '],"usage":null}\n\n' if call.include_usage else "]}\n\n"

    @abstractmethod
    def opening(self, choice: Choice) -> str:
        """The frames before a choice's first token."""

    @abstractmethod
    def delta(self, choice: Choice, token: Token) -> str:
        """The frame of one token, "" when it has nothing to tell."""

    @abstractmethod
    def closing(self, choice: Choice) -> str:
        """The frame that ends a choice."""

    @abstractmethod
    def whole(self, choice: Choice) -> dict[str, Any]:
        """The choice in a response that is not streamed."""

    def response(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The response that is not streamed."""
        whole = [self.whole(choice) for choice in choices]
        return self._head | {"choices": whole, "usage": usage.to_dict()}

    def frames(self, choice: Choice, token: Token) -> bytes:
        """Everything to send for one token."""
        is_first = len(choice.completion.tokens) == 1
        frames = self.opening(choice) if is_first else ""
        frames += self.delta(choice, token)
        if choice.completion.finish:
            frames += self.closing(choice)
        return frames.encode()

    def ending(self, usage: Usage) -> bytes:
        """The frames after the last choice has closed."""
        if not self.call.include_usage:
            return DONE
        chunk = self._head | {"object": self.chunk_name, "choices": [], "usage": usage.to_dict()}
        return f"data: {to_json(chunk)}\n\n".encode() + DONE

    def _chunk(self, choice_json: str) -> str:
        return f"{self._chunk_start}{choice_json}{self._chunk_end}"

    def _reports(self, token: Token) -> bool:
        """Whether a token belongs in logprobs; the EOS token that ended a sequence does not."""
        return self.call.logprobs and token.event.finish is not FinishReason.EOS_TOKEN


def quoted(value: str | None) -> str:
    """A JSON string, or null."""
    return "null" if value is None else dumps(value)
