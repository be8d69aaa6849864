"""GET /info, /health, /metrics and POST /tokenize: what is served and how it does."""

from __future__ import annotations

from importlib.metadata import version

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from lorafleet.router.body import read_fields
from lorafleet.router.fields import check_string
from lorafleet.router.prompt import max_prompt_tokens, max_total_tokens
from lorafleet.router.service import SERVICE


async def info(request: web.Request) -> web.Response:
    """GET /info: the model and the limits, in LoRAX's words."""
    service = request.app[SERVICE]
    info, config = service.engine.info, service.config
    return web.json_response(
        {
            "model_id": info.model_id,
            "model_sha": info.model_revision or None,
            "model_dtype": info.dtype,
            "model_device_type": info.device,
            "model_pipeline_tag": "text-generation",
            "model_architecture": info.architecture,
            "num_shard": info.world_size,
            "max_concurrent_requests": config.max_concurrent_requests,
            "max_best_of": config.max_best_of,
            "max_stop_sequences": config.max_stop_sequences,
            "max_input_length": max_prompt_tokens(config, info),
            "max_total_tokens": max_total_tokens(info),
            "max_batch_total_tokens": info.num_pages * info.page_size,
            "max_batch_prefill_tokens": info.max_step_tokens,
            "max_batch_size": info.max_rows,
            "max_active_adapters": info.num_slots,
            "validation_workers": config.validation_workers,
            "version": version("lorafleet"),
        }
    )


async def health(request: web.Request) -> web.Response:
    """GET /health and /: 200 while the shards are up and new work is taken, else 503."""
    service = request.app[SERVICE]
    if service.engine.failed.is_set() or service.concurrency.is_draining:
        body = {"error": "unhealthy", "error_type": "healthcheck"}
        return web.json_response(body, status=503)
    return web.Response()


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: Prometheus's text format."""
    body = request.app[SERVICE].metrics.exposition()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: the tokens of `inputs` and the characters each stands for."""
    fields = await read_fields(request)
    inputs = check_string("inputs", fields.required("inputs"))
    special = fields.boolean("add_special_tokens", True)
    spans = await request.app[SERVICE].forms.base.tokenizer.spans(
        inputs, add_special_tokens=special
    )
    return web.json_response(
        [
            {"id": id, "text": inputs[start:stop], "start": start, "stop": stop}
            for id, start, stop in spans
        ]
    )
