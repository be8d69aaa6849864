"""What can go wrong with a request, and the HTTP status that says so.

RequestError
├── BadRequest 400              what is asked cannot be done
├── AdminUnauthorized 401       the admin key is missing or wrong
├── AdminForbidden 403          there is no admin key and the caller is elsewhere
├── InvalidRequest 422          a field is out of its range
├── Overloaded 429              try again later
├── AdapterError
│   ├── AdapterNotFound 404     the source has no such adapter
│   ├── AdapterForbidden 403    the source refuses this caller
│   ├── NoAdapterRoom 507       what is pinned leaves no room for it
│   ├── AdapterUnservable 422   the adapter is there and cannot be served: the sentence says why
│   ├── SourceUnavailable 502   the source is down
│   └── SourceTimeout 504       the source is too slow
├── DeadlineExceeded 504        the request's own time is over
├── GenerationFailed 500        this sequence's computation went wrong
└── ShardLost 503               the group died under the request
"""

from __future__ import annotations

from typing import ClassVar


class RequestError(Exception):
    """A request that is answered with an error; the message is for the client."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"


class BadRequest(RequestError):
    """What is asked cannot be done as things are."""

    status = 400
    error_type = "bad_request"


class AdminUnauthorized(RequestError):
    """The admin key is missing or wrong."""

    status = 401
    error_type = "unauthorized"

    def __init__(self) -> None:
        super().__init__("this route needs the admin key, as Authorization: Bearer KEY")


class AdminForbidden(RequestError):
    """The service has no admin key, and the caller is not on its machine."""

    status = 403
    error_type = "forbidden"

    def __init__(self) -> None:
        super().__init__(
            "without --admin-api-key this route answers only callers on the server's own machine "
            "that do not come through a proxy or a browser"
        )


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


class NoAdapterRoom(AdapterError):
    """What operators pinned leaves no room for the adapter; nothing was evicted for it."""

    status = 507
    error_type = "adapter_no_room"


class AdapterUnservable(AdapterError):
    """The adapter exists and cannot be served."""

    status = 422
    error_type = "adapter_unservable"


class AdapterChanged(AdapterUnservable):
    """The adapter's content is another than a moment ago."""


class SourceUnavailable(AdapterError):
    """The adapter's source is down."""

    status = 502
    error_type = "adapter_source_unavailable"


class SourceTimeout(AdapterError):
    """The adapter's source is too slow."""

    status = 504
    error_type = "adapter_source_timeout"


class DeadlineExceeded(RequestError):
    """The request was not done in the time it was given."""

    status = 504
    error_type = "timeout"


class GenerationFailed(RequestError):
    """A sequence's computation went wrong."""

    error_type = "generation"


class ShardLost(RequestError):
    """The shard group died under the request."""

    status = 503
    error_type = "shard_lost"
