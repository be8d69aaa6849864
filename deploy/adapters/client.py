"""One call to a server's management API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)  # a drop waits for its requests


class ServerRefused(Exception):
    """The server's answer was an error; the message is what it said."""


async def call(
    url: str,
    admin_key: str,
    method: str,
    path: str,
    *,
    body: Mapping[str, Any] | None = None,
    query: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON answer; fields of `query` and `body` that are empty stay out.

    Raises ServerRefused, aiohttp.ClientError when there is no server, ValueError for a bad url.
    """
    headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
    sent = {name: value for name, value in body.items() if value} if body else None
    target = URL(url.rstrip("/") + quote(path), encoded=True)
    target = target.with_query({name: value for name, value in (query or {}).items() if value})
    async with (
        aiohttp.ClientSession(timeout=_TIMEOUT, headers=headers) as session,
        session.request(method, target, json=sent) as response,
    ):
        text = await response.text()
        if response.status != 200:
            raise ServerRefused(_said(response.status, text))
        answer: dict[str, Any] = json.loads(text)
        return answer


def _said(status: int, text: str) -> str:
    try:
        return f"{json.loads(text)['error']['message']} ({status})"
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}"
