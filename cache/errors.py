"""What can go wrong with an adapter; every message is a sentence for the client.

AdapterFault
├── AdapterNotFound     the source has no such adapter
├── AdapterForbidden    the source refuses this caller
├── AdapterUnservable   the adapter is there and cannot be served: the sentence says why
├── SourceUnavailable   the source is down
├── SourceTimeout       the source is too slow
└── TierFull            no room in a tier's budget
"""

from __future__ import annotations

_SHOWN_LENGTH = 120


class AdapterFault(Exception):
    """An adapter cannot be used; the message is for the client and holds no secret."""


class AdapterNotFound(AdapterFault):
    """The source has no such adapter."""


class AdapterForbidden(AdapterFault):
    """The source refuses this caller."""


class AdapterUnservable(AdapterFault):
    """The adapter exists and cannot be served."""


class SourceUnavailable(AdapterFault):
    """The adapter's source is down, or gave something it should not; worth trying again."""


class SourceTimeout(AdapterFault):
    """The adapter's source is too slow."""


class TierFull(AdapterFault):
    """A tier's byte budget has no room for the adapter."""


def shown(value: object) -> str:
    """A value from outside as it may stand in a message: quoted, printable, of bounded length."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}..."
