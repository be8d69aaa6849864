"""Callers: who asks for an adapter, told apart by token without keeping the token."""

from __future__ import annotations

import hmac
import secrets

from lorafleet.proto.messages import AdapterKey

Caller = tuple[AdapterKey, bytes]  # an adapter and a token's keyed hash


class Callers:
    """Hashes tokens (HMAC-SHA256) with a key of its own, so a hash is worth nothing elsewhere."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of(self, key: AdapterKey, api_token: str) -> Caller:
        """Whoever asks for this adapter with this token; "" is a caller without one."""
        return key, hmac.digest(self._key, api_token.encode(errors="replace"), "sha256")
