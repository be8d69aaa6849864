"""ArchiveUrl: the address of an adapter's archive, and the hosts the operator allows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit, urlunsplit

from lorafleet.cache.errors import AdapterForbidden, AdapterNotFound, AdapterUnservable, shown
from lorafleet.proto.messages import AdapterKey

_PORTS = {"http": 80, "https": 443}
_SHA256 = re.compile(r"sha256=([0-9a-fA-F]{64})")
# What no URL has as it is written, and parsers disagree about.
_STRANGE = re.compile(r"[^!-~]|\\")


@dataclass(frozen=True, slots=True)
class ArchiveUrl:
    """What is asked for; rebuilt from what was checked, so that nobody reads it in another way."""

    scheme: str
    host: str  # lower case
    port: int
    path: str
    query: str = ""
    sha256: str = ""  # what the archive must hash to, lower case; empty = nobody says

    @classmethod
    def parse(cls, key: AdapterKey) -> ArchiveUrl:
        """The URL an adapter's id is.

        Raises AdapterNotFound for what is none, AdapterUnservable for one with a secret in it:
        ids are shown in lists, logs and metrics.
        """
        wanted = "an archive's URL such as https://host/adapter.tar.gz"
        if _STRANGE.search(key.id) or key.revision:
            raise AdapterNotFound(f"{shown(str(key))} is not {wanted}.")
        url = cls._split(key.id)
        if url is None:
            raise AdapterNotFound(f"{shown(key.id)} is not {wanted}.")
        parts = urlsplit(key.id)
        if parts.username is not None or parts.query:
            raise AdapterUnservable(
                "An archive's URL must have no user, password or query: the ids of adapters are "
                "shown in lists and logs."
            )
        digest = _SHA256.fullmatch(parts.fragment)
        if parts.fragment and not digest:
            raise AdapterNotFound(
                f"{shown(key.id)} must end in #sha256= and 64 hexadecimal digits, or in no #."
            )
        return cls(
            url.scheme, url.host, url.port, url.path, "", digest[1].lower() if digest else ""
        )

    @classmethod
    def _split(cls, text: str) -> ArchiveUrl | None:
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            return None
        if parts.scheme not in _PORTS or not parts.hostname or port == 0:
            return None
        host, path = parts.hostname.lower(), parts.path or "/"
        return cls(parts.scheme, host, port or _PORTS[parts.scheme], path, parts.query)

    def __str__(self) -> str:
        """For the HTTP client; a redirect's may hold a secret."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return urlunsplit((self.scheme, f"{host}:{self.port}", self.path, self.query, ""))

    def joined(self, location: str) -> ArchiveUrl | None:
        """Where a redirect leads, or None when that is not a URL."""
        target = urljoin(str(self), location)
        return None if _STRANGE.search(target) else self._split(target)


class AllowedHosts:
    """`host` allows its two default ports, `host:port` that one."""

    def __init__(self, hosts: Iterable[str]) -> None:
        """Raises ValueError, naming the flag, for what is not a host."""
        self._pairs = {pair for host in hosts for pair in _pairs(host)}

    def check(self, url: ArchiveUrl) -> None:
        """Raises AdapterForbidden unless the operator allows the host."""
        if not self._pairs:
            raise AdapterForbidden(
                "Adapters from HTTP are not served here: --adapter-http-hosts allows no host."
            )
        if (url.host, url.port) not in self._pairs:
            raise AdapterForbidden(
                f"--adapter-http-hosts does not allow {shown(f'{url.host}:{url.port}')}."
            )


def _pairs(text: str) -> list[tuple[str, int]]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or text.rpartition("@")[0] or any(c in text for c in "/?#"):
        raise ValueError(f"--adapter-http-hosts must be hosts, or host:port, got {text!r}")
    return [(host.lower(), number) for number in ([port] if port else _PORTS.values())]
