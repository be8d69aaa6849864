"""Request bodies: JSON objects of a sane size."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from aiohttp import web

from lorafleet.router.errors import InvalidRequest, RequestError
from lorafleet.router.fields import Fields

MAX_BODY_BYTES = 2 * 2**20
BODY_SECONDS = 30.0  # for all of a body to come


class MalformedBody(RequestError):
    """The body is not JSON."""

    status = 400
    error_type = "malformed"


class BodyTimeout(RequestError):
    """The body did not come."""

    status = 408
    error_type = "timeout"


async def read_fields(request: web.Request) -> Fields:
    """The body's fields.

    Raises MalformedBody when it is not JSON (NaN and Infinity are not), InvalidRequest when it is
    not an object, BodyTimeout when it is not there after BODY_SECONDS, and aiohttp's
    HTTPRequestEntityTooLarge over MAX_BODY_BYTES.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
    except TimeoutError:
        raise BodyTimeout(f"the body did not come within {BODY_SECONDS:g} seconds") from None
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
