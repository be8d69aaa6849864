"""What can go wrong with a request, and the HTTP status that says so.

RequestError
├── InvalidRequest 422          a field is out of its range
├── Overloaded 429              try again later
├── AdapterError
│   ├── AdapterNotFound 404     the source has no such adapter
│   ├── AdapterForbidden 403    the source refuses this caller
│   ├── AdapterUnservable 422   the adapter is there and cannot be served: the sentence says why
│   ├── SourceUnavailable 502   the source is down
│   └── SourceTimeout 504       the source is too slow
├── GenerationFailed 500        this sequence's computation went wrong
└── ShardLost 503               the group died under the request
"""

from __future__ import annotations

from typing import ClassVar


class RequestError(Exception):
    """A request that is answered with an error; the message is for the client."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"


class InvalidRequest(RequestError):
    """A field is missing, of the wrong type or out of its range."""

    status = 422
    error_type = "validation"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Overloaded(RequestError):
    """The service is at a limit."""

    status = 429
    error_type = "overloaded"

    def __init__(self, message: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class AdapterError(RequestError):
    """An adapter cannot be used."""

    retry_after_seconds: int = 0  # when asking again makes sense; 0 = nobody knows


class AdapterNotFound(AdapterError):
    """The source has no such adapter."""

    status = 404
    error_type = "adapter_not_found"


class AdapterForbidden(AdapterError):
    """The source refuses this caller."""

    status = 403
    error_type = "adapter_forbidden"


class AdapterUnservable(AdapterError):
    """The adapter exists and cannot be served."""

    status = 422
    error_type = "adapter_unservable"


class SourceUnavailable(AdapterError):
    """The adapter's source is down."""

    status = 502
    error_type = "adapter_source_unavailable"


class SourceTimeout(AdapterError):
    """The adapter's source is too slow."""

    status = 504
    error_type = "adapter_source_timeout"


class GenerationFailed(RequestError):
    """A sequence's computation went wrong."""

    error_type = "generation"


class ShardLost(RequestError):
    """The shard group died under the request."""

    status = 503
    error_type = "shard_lost"
