"""The web application: routes, what wraps them, and what lives as long as they do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import perf_counter

from aiohttp import web
from aiohttp.typedefs import Handler

from lorafleet.router import (
    routes_adapters,
    routes_lorax,
    routes_openai,
    routes_service,
    routes_vllm,
)
from lorafleet.router.body import MAX_BODY_BYTES
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.event_stream import EventResponse
from lorafleet.router.failures import CLIENT_GONE, answer_errors
from lorafleet.router.service import SERVICE, Service


def build_app(engine: Engine, config: RouterConfig) -> web.Application:
    """The application over a connected engine, which the caller closes after it.

    Run it with `handler_cancellation=True`: a client that leaves then ends its generations.
    """
    app = web.Application(
        client_max_size=MAX_BODY_BYTES, middlewares=[_count_requests, answer_errors]
    )
    app[SERVICE] = Service.of(engine, config)
    app.cleanup_ctx.append(_background)
    app.add_routes(
        [
            web.get("/", routes_service.health, allow_head=True),
            web.get("/health", routes_service.health),
            web.get("/info", routes_service.info),
            web.get("/metrics", routes_service.metrics),
            web.post("/tokenize", routes_service.tokenize),
            web.post("/", routes_lorax.generate_compatible),
            web.post("/generate", routes_lorax.generate),
            web.post("/generate_stream", routes_lorax.generate_stream),
            web.get("/v1/models", routes_openai.models),
            web.post("/v1/completions", routes_openai.completions),
            web.post("/v1/chat/completions", routes_openai.chat_completions),
            web.get("/v1/adapters", routes_adapters.list_adapters),
            web.post("/v1/adapters", routes_adapters.load_adapter),
            web.delete("/v1/adapters/{id:.+}", routes_adapters.drop_adapter),
            web.delete("/v1/aliases/{alias:.+}", routes_adapters.drop_alias),
            web.post("/v1/load_lora_adapter", routes_vllm.load_lora_adapter),
            web.post("/v1/unload_lora_adapter", routes_vllm.unload_lora_adapter),
        ]
    )
    return app


@web.middleware
async def _count_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    metrics = request.app[SERVICE].metrics
    resource = request.match_info.route.resource
    route = resource.canonical if resource else "unknown"
    status, started_at = CLIENT_GONE, perf_counter()
    try:
        response = await handler(request)
        status = response.outcome if isinstance(response, EventResponse) else response.status
        return response
    finally:
        metrics.requests.labels(route, str(status)).inc()
        if request.method == "POST":
            metrics.duration.observe(perf_counter() - started_at)


async def _background(app: web.Application) -> AsyncIterator[None]:
    service = app[SERVICE]
    keep_alive = asyncio.create_task(service.keep_alive.run())
    yield
    keep_alive.cancel()
    await asyncio.gather(keep_alive, return_exceptions=True)
    await service.forms.close()
