"""LoRAX's JSON: /generate, /generate_stream and / in, completions and stream frames out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from json import dumps
from typing import Any

from lorafleet.proto.messages import AdapterKey, ShardInfo
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.body import to_json
from lorafleet.router.config import RouterConfig
from lorafleet.router.deadline import Deadline, read_deadline
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields, check_string
from lorafleet.router.generation import Generation
from lorafleet.router.merged_adapters import read_adapter_or_merge
from lorafleet.router.priority import read_priority
from lorafleet.router.prompt import (
    fit,
    max_prompt_tokens,
    max_total_tokens,
    read_api_token,
)
from lorafleet.router.request import FinishReason, GenerationRequest, TokenEvent
from lorafleet.router.sampling import MAX_TOP_LOGPROBS, Sampling, read_sampling
from lorafleet.router.text import Completion, Token
from lorafleet.router.tokenizer import Tokenizer

_MAX_TEMPERATURE = 100.0
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "typical_p")


@dataclass(frozen=True, slots=True)
class LoraxCall:
    """A checked request body."""

    inputs: str
    stream: bool
    adapter: AdapterKey | None
    sampling: Sampling
    best_of: int
    max_new_tokens: int | None  # None = all that fit
    stops: list[str]
    truncate: int | None  # keep this many tokens at the end of the prompt
    details: bool
    ignore_eos: bool
    return_full_text: bool
    deadline: Deadline
    priority: int
    api_token: str = field(repr=False)

    @property
    def prompt_logprobs(self) -> bool:
        """Whether the prompt's tokens are reported (`decoder_input_details`)."""
        return self.sampling.params.prompt_logprobs

    @property
    def prefix(self) -> str:
        """What generated_text begins with."""
        return self.inputs if self.return_full_text else ""

    def requests(
        self,
        prompt_ids: list[int],
        eos_token_ids: frozenset[int],
        config: RouterConfig,
        info: ShardInfo,
    ) -> list[GenerationRequest]:
        """One per sequence of `best_of`. Raises PromptTooLong."""
        if self.truncate is not None:
            prompt_ids = prompt_ids[-self.truncate :]
        max_new = fit(
            len(prompt_ids),
            self.max_new_tokens,
            config,
            info,
            prompt_field="inputs",
            max_new_field="max_new_tokens",
        )
        return [
            GenerationRequest(
                prompt_ids=prompt_ids,
                sampling=self.sampling.of_sequence(index),
                max_new_tokens=max_new,
                adapter=self.adapter,
                ignore_eos=self.ignore_eos,
                api_token=self.api_token,
                deadline=self.deadline,
                priority=self.priority,
                eos_token_ids=eos_token_ids,
            )
            for index in range(self.best_of)
        ]


def read_call(
    body: Fields,
    headers: Mapping[str, str],
    config: RouterConfig,
    info: ShardInfo,
    names: AdapterNames,
    stream: bool | None = None,
) -> LoraxCall:
    """Checks a body; `stream` None takes the body's own flag. Raises InvalidRequest."""
    inputs = check_string("inputs", body.required("inputs"))
    if not inputs:
        raise InvalidRequest("`inputs` cannot be empty", "inputs")
    fields = body.object("parameters") or Fields({})
    fields.unsupported("response_format")
    body.unsupported("tools")
    if fields.boolean("watermark"):
        raise InvalidRequest("`watermark` is not supported", "watermark")
    adapter_id = fields.string("adapter_id", "")
    adapter = read_adapter_or_merge(adapter_id, "adapter_id", fields, names)
    call = LoraxCall(
        inputs=inputs,
        stream=body.boolean("stream") if stream is None else stream,
        adapter=adapter,
        sampling=_read_sampling(fields),
        best_of=fields.integer("best_of", 1, 1, config.max_best_of),
        max_new_tokens=fields.integer("max_new_tokens", None, 1, max_total_tokens(info)),
        stops=fields.strings("stop", config.max_stop_sequences),
        truncate=fields.integer("truncate", None, 1, max_prompt_tokens(config, info)),
        details=fields.boolean("details"),
        ignore_eos=fields.boolean("ignore_eos_token"),
        return_full_text=fields.boolean("return_full_text"),
        deadline=read_deadline(fields, config),
        priority=read_priority(fields),
        api_token=read_api_token(fields, adapter, headers),
    )
    _refuse_misplaced(body, fields)
    _check_combinations(call)
    return call


def _refuse_misplaced(body: Fields, parameters: Fields) -> None:
    """Refuses a parameter beside `parameters`; the parameters are those that have been read."""
    for name in sorted(parameters.read_names):
        if body.has(name):
            raise InvalidRequest(f"`{name}` belongs in `parameters`", name)


def _read_sampling(fields: Fields) -> Sampling:
    sampled = fields.boolean("do_sample") or any(map(fields.has, _SAMPLING_FIELDS))
    return read_sampling(
        fields,
        temperature=1.0 if sampled else 0.0,
        max_temperature=_MAX_TEMPERATURE,
        top_k_off=False,
        num_top_logprobs=fields.integer("return_k_alternatives", 0, 1, MAX_TOP_LOGPROBS),
        prompt_logprobs=fields.boolean("decoder_input_details"),
    )


def _check_combinations(call: LoraxCall) -> None:
    if call.best_of > 1 and call.stream:
        raise InvalidRequest("`best_of` must be 1 when streaming tokens", "best_of")
    if call.best_of > 1 and call.sampling.seed is None:
        raise InvalidRequest("you must use sampling when `best_of` is > 1", "best_of")
    if call.prompt_logprobs and call.stream:
        raise InvalidRequest(
            "`decoder_input_details` must be false when streaming tokens", "decoder_input_details"
        )


@dataclass(frozen=True, slots=True)
class LoraxSequence:
    """One sequence of a call: what was asked, what came."""

    request: GenerationRequest
    generation: Generation
    completion: Completion

    @property
    def seed(self) -> int | None:
        """What it was drawn with; None when greedy."""
        sampling = self.request.sampling
        return sampling.seed if sampling.temperature else None


class LoraxWriter:
    """Completions as LoRAX's JSON."""

    def __init__(self, call: LoraxCall, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer

    def response(self, sequences: list[LoraxSequence]) -> dict[str, Any]:
        """The whole answer; of several sequences the likeliest leads."""
        best, *others = sorted(
            sequences, key=lambda sequence: sequence.completion.mean_logprob, reverse=True
        )
        response: dict[str, Any] = {"generated_text": self._full_text(best)}
        if self._call.details or self._call.prompt_logprobs:
            response["details"] = self._details(best)
            if others:
                response["details"]["best_of_sequences"] = [
                    {"generated_text": self._full_text(other)} | self._details(other)
                    for other in others
                ]
        return response

    def frame(self, token: Token, sequence: LoraxSequence) -> bytes:
        """The stream frame of one token; the last one carries the whole text."""
        event = token.event
        head = (
            f'data:{{"token":{{"id":{event.token_id},"text":{dumps(token.text)},'
            f'"logprob":{event.logprob},"special":{_BOOL[self._is_special(event)]}'
        )
        if event.top:
            head += f',"alternative_tokens":{to_json(self._alternatives(event))}'
        return (head + self._frame_end(sequence)).encode()

    def _frame_end(self, sequence: LoraxSequence) -> str:
        completion = sequence.completion
        if completion.finish is None:
            return ',"skipped":false},"generated_text":null,"details":null}\n\n'
        details = to_json(self._summary(sequence)) if self._call.details else "null"
        text = dumps(self._full_text(sequence))
        return f',"skipped":false}},"generated_text":{text},"details":{details}}}\n\n'

    def _full_text(self, sequence: LoraxSequence) -> str:
        return self._call.prefix + sequence.completion.text

    def _summary(self, sequence: LoraxSequence) -> dict[str, Any]:
        completion = sequence.completion
        assert completion.finish is not None, "only a finished sequence is summed up"
        return {
            "finish_reason": completion.finish.value,
            "prompt_tokens": len(sequence.request.prompt_ids),
            "generated_tokens": len(completion.tokens),
            "seed": sequence.seed,
        }

    def _details(self, sequence: LoraxSequence) -> dict[str, Any]:
        prefill = self._prefill(sequence) if self._call.prompt_logprobs else []
        tokens = [self._token(token) for token in sequence.completion.tokens]
        return self._summary(sequence) | {"skipped_tokens": 0, "prefill": prefill, "tokens": tokens}

    def _prefill(self, sequence: LoraxSequence) -> list[dict[str, Any]]:
        logprobs = [None, *sequence.generation.prompt_logprobs]
        return [
            {"id": token_id, "text": self._tokenizer.token_text(token_id), "logprob": logprob}
            for token_id, logprob in zip(sequence.request.prompt_ids, logprobs, strict=True)
        ]

    def _token(self, token: Token) -> dict[str, Any]:
        event = token.event
        value = {
            "id": event.token_id,
            "text": token.text,
            "logprob": event.logprob,
            "special": self._is_special(event),
            "skipped": False,
        }
        if event.top:
            value["alternative_tokens"] = self._alternatives(event)
        return value

    def _alternatives(self, event: TokenEvent) -> list[dict[str, Any]]:
        return [
            {"id": token_id, "text": self._tokenizer.token_text(token_id), "logprob": logprob}
            for token_id, logprob in event.top
        ]

    def _is_special(self, event: TokenEvent) -> bool:
        is_end = event.finish is FinishReason.EOS_TOKEN
        return is_end or event.token_id in self._tokenizer.special_ids


_BOOL = {True: "true", False: "false"}
