"""Where a running server is: what --url says, else LORAFLEET_URL, else this machine's."""

from __future__ import annotations

import os
import re

import aiohttp

VARIABLE = "LORAFLEET_URL"
DEFAULT_URL = "http://localhost:3000"


def server_url(given: str | None) -> str:
    """The server's address without a slash at its end; `given` is --url, None when it was not.

    Raises ValueError, naming where it came from, for what is no http or https address.
    """
    name, url = "--url", given
    if url is None:
        name, url = VARIABLE, os.environ.get(VARIABLE) or DEFAULT_URL
    if not re.match("https?://[^/]", url):
        raise ValueError(f"{name} must start with http:// or https://, got {url!r}")
    return url.rstrip("/")


def what_failed(error: Exception, url: str) -> str:
    """A sentence about a request to `url`; what aiohttp says of a server that is not there is
    about sockets."""
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(
        error, aiohttp.ClientSSLError
    ):
        return f"no server at {url}: give --url or set {VARIABLE}"
    return str(error) or type(error).__name__
