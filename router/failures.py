"""Errors as responses: LoRAX's shape everywhere, OpenAI's under /v1."""

from __future__ import annotations

import logging
from http import HTTPStatus
from json import dumps
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from lorafleet.router.errors import (
    AdapterError,
    AdapterNotFound,
    AdminUnauthorized,
    InvalidRequest,
    Overloaded,
    RequestError,
)

log = logging.getLogger(__name__)

CLIENT_GONE = 499  # what a request whose client left counts as
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever a handler raises into JSON."""
    try:
        return await handler(request)
    except ConnectionResetError:
        return web.Response(status=CLIENT_GONE)
    except Exception as error:
        return to_response(error, openai=is_openai(request))


def is_openai(request: web.Request) -> bool:
    """Whether the client speaks OpenAI's dialect."""
    return request.path.startswith("/v1/")


def to_response(error: Exception, *, openai: bool) -> web.Response:
    """The response for an error; an unexpected one is logged and says nothing of its cause."""
    status = status_of(error)
    headers = {}
    if isinstance(error, Overloaded | AdapterError) and error.retry_after_seconds:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, AdminUnauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    body = dumps(to_object(error, openai=openai))
    return web.Response(text=body, status=status, headers=headers, content_type="application/json")


def status_of(error: Exception) -> int:
    """The HTTP status of an error; logs one that nobody expected."""
    if isinstance(error, RequestError | web.HTTPException):
        return error.status
    log.error("a request failed unexpectedly", exc_info=error)
    return 500


def to_object(error: Exception, *, openai: bool) -> dict[str, Any]:
    """The error as either dialect's JSON object."""
    if isinstance(error, RequestError):
        message, kind = str(error), error.error_type
    elif isinstance(error, web.HTTPException):
        message, kind = _http_message(error), _http_kind(error.status)
    else:
        message, kind = "the service failed on this request", "internal"
    if not openai:
        return {"error": message, "error_type": kind}
    return {"error": {"message": message} | _openai_labels(error, kind)}


def _openai_labels(error: Exception, kind: str) -> dict[str, str | None]:
    status = error.status if isinstance(error, RequestError | web.HTTPException) else 500
    param = error.field or None if isinstance(error, InvalidRequest) else None
    code: str | None = kind
    if isinstance(error, InvalidRequest):
        code = getattr(error, "code", None)
    elif isinstance(error, AdapterError):
        param = "model"
        code = "model_not_found" if isinstance(error, AdapterNotFound) else kind
    elif isinstance(error, Overloaded):
        code = "rate_limit_exceeded"
    default = "server_error" if status >= 500 else "invalid_request_error"
    return {"type": _OPENAI_TYPES.get(status, default), "param": param, "code": code}


def _http_message(error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return f"the body is too large: {error.text}"
    return f"{error.status} {error.reason}"


def _http_kind(status: int) -> str:
    return HTTPStatus(status).phrase.lower().replace(" ", "_")
