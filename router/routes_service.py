"""GET /info, /health, /metrics and POST /tokenize: what is served and how it does."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from lorafleet.router.body import read_fields, to_json
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import check_string
from lorafleet.router.prompt import max_characters, max_prompt_tokens, max_total_tokens
from lorafleet.router.service import SERVICE
from lorafleet.router.tokenizer import Span

_MAX_CHARACTERS = 1 << 18  # that /tokenize takes, or those of the longest sequence


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
    service = request.app[SERVICE]
    with service.concurrency.arrive():
        fields = await read_fields(request)
        inputs = check_string("inputs", fields.required("inputs"))
        longest = max(_MAX_CHARACTERS, max_characters(service.engine.info))
        if len(inputs) > longest:
            raise InvalidRequest(
                f"`inputs` must have at most {longest} characters, got {len(inputs)}", "inputs"
            )
        special = fields.boolean("add_special_tokens", True)
        tokenizer = service.forms.base.tokenizer
        with service.concurrency.enter():
            spans = await tokenizer.spans(inputs, add_special_tokens=special)
            text = await tokenizer.in_thread(_show, inputs, spans)
    return web.Response(text=text, content_type="application/json")


def _show(inputs: str, spans: list[Span]) -> str:
    return to_json([_token(inputs, span) for span in spans])


def _token(inputs: str, span: Span) -> dict[str, Any]:
    text = inputs[span.start : span.stop]
    return {"id": span.id, "text": text, "start": span.start, "stop": span.stop}
