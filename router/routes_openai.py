"""POST /v1/completions and /v1/chat/completions, GET /v1/models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from lorafleet.cache.merging import recipe
from lorafleet.router.answer import Answer, served_by
from lorafleet.router.body import read_fields
from lorafleet.router.chat import read_messages
from lorafleet.router.chat_completions import ChatWriter, read_chat_call
from lorafleet.router.completions import (
    CompletionWriter,
    check_token_ids,
    read_completion_call,
    read_prompts,
)
from lorafleet.router.fields import check_string
from lorafleet.router.openai import Choice, OpenAiCall, OpenAiWriter, Usage
from lorafleet.router.prompt import fit
from lorafleet.router.request import GenerationRequest
from lorafleet.router.service import SERVICE, Addressee, Clock, Service
from lorafleet.router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str | None  # None: that of the ids
    ids: list[int]


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions."""
    service, clock = request.app[SERVICE], Clock.start()
    with service.concurrency.arrive():
        fields = await read_fields(request)
        config, info = service.config, service.engine.info
        call = read_completion_call(fields, request.headers, config, info, service.names)
        echo = fields.boolean("echo")
        given = read_prompts(fields, config.max_concurrent_requests)

        async def prompts(to: Addressee) -> list[_Prompt]:
            return [await _prompt(to, prompt, echo) for prompt in given]

        def writer(tokenizer: Tokenizer) -> OpenAiWriter:
            return CompletionWriter(call, tokenizer, echo=echo)

        with service.concurrency.enter(len(given) * call.best_of, "prompt"):
            return await _respond(request, clock, call, writer, prompts, "prompt")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    service, clock = request.app[SERVICE], Clock.start()
    with service.concurrency.arrive():
        fields = await read_fields(request)
        info = service.engine.info
        call = read_chat_call(fields, request.headers, service.config, info, service.names)
        messages = read_messages(fields)

        async def prompts(to: Addressee) -> list[_Prompt]:
            text = check_string("messages", await to.form.render(messages))
            ids = await to.tokenizer.encode(text, field="messages", add_special_tokens=False)
            return [_Prompt(text, ids)]

        writer = partial(ChatWriter, call)
        with service.concurrency.enter(call.best_of, "n"):
            return await _respond(request, clock, call, writer, prompts, "messages")


async def models(request: web.Request) -> web.Response:
    """GET /v1/models: the base model, every adapter the shards know, and every alias.

    Merged adapters are not among them: they are known by what asked for them. Nor are those that
    not everybody may use, and their aliases do not tell what they stand for.
    """
    service = request.app[SERVICE]
    info = service.engine.info
    card = {"object": "model", "created": service.started_at, "owned_by": "lorafleet"}
    base = {"root": info.model_id, "parent": None, "max_model_len": info.max_model_len}
    tiers = {status.key: status.tier for status in service.engine.stats().adapters}
    public = [a for a in await service.engine.adapters() if a.key.source != recipe.SOURCE]
    named = {adapter.key for adapter in public}
    adapters = [
        card
        | {"id": str(adapter.key), "root": adapter.key.id, "parent": info.model_id}
        | {"source": adapter.key.source, "rank": adapter.rank}
        | {"tier": tiers.get(adapter.key, adapter.tier).name.lower()}
        for adapter in public
    ]
    aliases = [
        card
        | {"id": name, "root": str(key) if key in named else name}
        | {"parent": info.model_id, "source": key.source}
        for name, key in service.aliases
    ]
    data = [card | {"id": info.model_id} | base, *adapters, *aliases]
    return web.json_response({"object": "list", "data": data})


async def _prompt(to: Addressee, given: str | list[int], echo: bool) -> _Prompt:
    if isinstance(given, str):
        return _Prompt(given, await to.tokenizer.encode(given, field="prompt"))
    check_token_ids(given, to.num_tokens)
    return _Prompt(None if echo else "", given)


async def _respond(
    request: web.Request,
    clock: Clock,
    call: OpenAiCall,
    make_writer: Callable[[Tokenizer], OpenAiWriter],
    read_prompts: Callable[[Addressee], Awaitable[list[_Prompt]]],
    prompt_field: str,
) -> web.StreamResponse:
    service = request.app[SERVICE]
    async with AsyncExitStack() as stack:
        async with service.addressed(call.adapter, call.api_token, call.deadline) as to:
            prompts = await read_prompts(to)
            requests = [
                _requests(service, call, to, prompt.ids, prompt_field) for prompt in prompts
            ]
            clock.validated(to.hold.seconds)
            texts = [_text(prompt, to.tokenizer) for prompt in prompts]
            choices = [
                Choice(
                    index=0,
                    prompt_text=text,
                    request=one,
                    generation=await service.start(stack, one, to),
                    completion=service.completion(
                        one, to.tokenizer, call.stops, clock.received_at, keep_stops=False
                    ),
                )
                for text, best_of in zip(texts, requests, strict=True)
                for one in best_of
            ]
        writer = make_writer(to.tokenizer)
        for index, choice in enumerate(choices):
            choice.index = index
        answer = Answer(
            request=request,
            clock=clock,
            prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            adapter=call.adapter,
            headers=served_by(service.engine.info.model_id, call.adapter),
            generations=[choice.generation for choice in choices],
            completions=[choice.completion for choice in choices],
        )
        if call.stream:
            return await answer.stream(
                lambda index, token: writer.frames(choices[index], token),
                lambda: writer.ending(_usage(answer)),
            )
        return await answer.whole(lambda: writer.response(_best(choices, call), _usage(answer)))


def _text(prompt: _Prompt, tokenizer: Tokenizer) -> str:
    """Of a prompt that is known to fit: decoding takes its time."""
    return tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text


def _usage(answer: Answer) -> Usage:
    return Usage(answer.prompt_tokens, answer.generated_tokens)


def _requests(
    service: Service, call: OpenAiCall, to: Addressee, prompt_ids: list[int], prompt_field: str
) -> list[GenerationRequest]:
    max_new = fit(
        len(prompt_ids),
        call.max_new_tokens,
        service.config,
        service.engine.info,
        prompt_field=prompt_field,
        max_new_field=call.max_new_field,
    )
    return [
        GenerationRequest(
            prompt_ids=prompt_ids,
            sampling=call.sampling.of_sequence(index),
            max_new_tokens=max_new,
            adapter=call.adapter,
            ignore_eos=call.ignore_eos,
            api_token=call.api_token,
            deadline=call.deadline,
            priority=call.priority,
            eos_token_ids=to.form.eos_token_ids,
        )
        for index in range(call.best_of)
    ]


def _best(choices: list[Choice], call: OpenAiCall) -> list[Choice]:
    """Of each prompt's `best_of` sequences the `n` likeliest, numbered anew."""
    kept: list[Choice] = []
    for start in range(0, len(choices), call.best_of):
        of_prompt = choices[start : start + call.best_of]
        if call.best_of > call.n:
            of_prompt.sort(key=lambda choice: choice.completion.mean_logprob, reverse=True)
        kept += of_prompt[: call.n]
    for index, choice in enumerate(kept):
        choice.index = index
    return kept
