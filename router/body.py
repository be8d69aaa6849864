"""Request bodies: JSON objects of a sane size."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from aiohttp import web

from lorafleet.router.errors import InvalidRequest, RequestError
from lorafleet.router.fields import Fields

MAX_BODY_BYTES = 2 * 2**20


class MalformedBody(RequestError):
    """The body is not JSON."""

    status = 400
    error_type = "malformed"


async def read_fields(request: web.Request) -> Fields:
    """The body's fields.

    Raises MalformedBody when it is not JSON (NaN and Infinity are not), InvalidRequest when it is
    not an object, and aiohttp's HTTPRequestEntityTooLarge over MAX_BODY_BYTES.
    """
    body = await request.read()
    try:
        values = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedBody(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidRequest("the body must be a JSON object")
    return Fields(values)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def to_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"))
