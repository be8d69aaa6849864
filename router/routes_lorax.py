"""POST /generate, /generate_stream and /: LoRAX's generation routes."""

from __future__ import annotations

from contextlib import AsyncExitStack

from aiohttp import web

from lorafleet.router.answer import Answer, served_by
from lorafleet.router.body import read_fields
from lorafleet.router.lorax import LoraxCall, LoraxSequence, LoraxWriter, read_call
from lorafleet.router.request import GenerationRequest
from lorafleet.router.service import SERVICE, Addressee, Clock, Service


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /generate: one JSON object."""
    return await _respond(request, stream=False)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """POST /generate_stream: server-sent events."""
    return await _respond(request, stream=True)


async def generate_compatible(request: web.Request) -> web.StreamResponse:
    """POST /: `stream` in the body chooses between events and a JSON array of one object."""
    return await _respond(request, stream=None)


async def _respond(request: web.Request, stream: bool | None) -> web.StreamResponse:
    service, clock = request.app[SERVICE], Clock.start()
    with service.concurrency.arrive():
        body, info = await read_fields(request), service.engine.info
        call = read_call(body, request.headers, service.config, info, service.names, stream)
        with service.concurrency.enter(call.best_of, "best_of"):
            return await _answer(request, call, clock, as_list=stream is None)


async def _answer(
    request: web.Request, call: LoraxCall, clock: Clock, *, as_list: bool
) -> web.StreamResponse:
    service = request.app[SERVICE]
    info = service.engine.info
    async with AsyncExitStack() as stack:
        async with service.addressed(call.adapter, call.api_token, call.deadline) as to:
            prompt_ids = await to.tokenizer.encode(call.inputs, field="inputs")
            requests = call.requests(prompt_ids, to.form.eos_token_ids, service.config, info)
            clock.validated(to.hold.seconds)
            sequences = await _start(service, stack, call, requests, to, clock)
        answer = Answer(
            request=request,
            clock=clock,
            prompt_tokens=len(requests[0].prompt_ids),
            adapter=call.adapter,
            headers=served_by(info.model_id, call.adapter),
            generations=[sequence.generation for sequence in sequences],
            completions=[sequence.completion for sequence in sequences],
        )
        writer = LoraxWriter(call, to.tokenizer)
        if call.stream:
            return await answer.stream(
                lambda index, token: writer.frame(token, sequences[index]), ending=bytes
            )
        if as_list:
            return await answer.whole(lambda: [writer.response(sequences)])
        return await answer.whole(lambda: writer.response(sequences))


async def _start(
    service: Service,
    stack: AsyncExitStack,
    call: LoraxCall,
    requests: list[GenerationRequest],
    to: Addressee,
    clock: Clock,
) -> list[LoraxSequence]:
    return [
        LoraxSequence(
            request=request,
            generation=await service.start(stack, request, to),
            completion=service.completion(
                request, to.tokenizer, call.stops, clock.received_at, keep_stops=True
            ),
        )
        for request in requests
    ]
