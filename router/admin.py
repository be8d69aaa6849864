"""Who may manage the service: callers with the admin key or, without one, this machine's."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from functools import wraps
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from aiohttp import HttpVersion, HttpVersion11, web
from aiohttp.typedefs import Handler

from lorafleet.router.errors import AdminForbidden, AdminUnauthorized, RequestError
from lorafleet.router.service import SERVICE

# A proxy on this machine makes everybody a local caller, and a browser acts for any web page.
_NOT_FROM_HERE = (
    "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via", "Origin", "Referer",
    "Sec-Fetch-Site",
)  # fmt: skip


def admin_only(handler: Handler) -> Handler:
    """Refuses callers that may not manage the service, before their body is read."""

    @wraps(handler)
    async def checked(request: web.Request) -> web.StreamResponse:
        key = request.app[SERVICE].config.admin_api_key
        if error := refusal_of(key, request.remote, request.headers, request.version):
            raise error
        return await handler(request)

    return checked


def refusal_of(
    key: str,
    remote: str | None,
    headers: Mapping[str, str],
    version: HttpVersion = HttpVersion11,
) -> RequestError | None:
    """Why a caller is refused, None if it may go on. `key` "" is a service without admin key."""
    if key:
        return None if _has_key(key, headers) else AdminUnauthorized()
    is_local = _is_loopback(remote) and _names_this_machine(headers.get("Host", ""))
    # nginx speaks the older HTTP, and adds no header by itself.
    is_passed_on = version < HttpVersion11 or any(name in headers for name in _NOT_FROM_HERE)
    return None if is_local and not is_passed_on else AdminForbidden()


def _names_this_machine(host: str) -> bool:
    """Whether a Host header has no name but this machine's own, which a web page cannot have."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _has_key(key: str, headers: Mapping[str, str]) -> bool:
    scheme, _, given = headers.get("Authorization", "").partition(" ")
    # Compared in a time that does not tell how much of it was right.
    same = hmac.compare_digest(given.strip().encode(errors="replace"), key.encode())
    return same and scheme.lower() == "bearer"


def _is_loopback(remote: str | None) -> bool:
    try:
        address = ip_address((remote or "").partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
