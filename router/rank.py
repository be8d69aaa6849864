"""Rank: one shard process over gRPC; the only place that knows gRPC's errors."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
from grpc import aio

from lorafleet.proto import shard_pb2
from lorafleet.proto.codec import decode, deserializer, serialize
from lorafleet.proto.messages import (
    AdapterInfo,
    AdapterKey,
    AdapterTokenizer,
    DropAdapterRequest,
    FetchAdapterRequest,
    FetchProgress,
    ShardInfo,
    StepResult,
)
from lorafleet.router.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterNotFound,
    AdapterUnservable,
    Overloaded,
    RequestError,
    ShardLost,
    SourceTimeout,
    SourceUnavailable,
)

_SERVICE = "/lorafleet.v1.Shard/"
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_DESCRIBE_RETRY_SECONDS = 0.1
_FETCH_ERRORS: dict[grpc.StatusCode, type[RequestError]] = {
    grpc.StatusCode.NOT_FOUND: AdapterNotFound,
    grpc.StatusCode.PERMISSION_DENIED: AdapterForbidden,
    grpc.StatusCode.INVALID_ARGUMENT: AdapterUnservable,
    grpc.StatusCode.UNAVAILABLE: SourceUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: SourceTimeout,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
}


class Rank:
    """A channel to one rank, and the calls it answers."""

    def __init__(self, rank: int, address: str) -> None:
        self.rank = rank
        self.address = address
        self._channel = aio.insecure_channel(address, _OPTIONS)
        self._describe = self._channel.unary_unary(
            _SERVICE + "Describe", None, deserializer(ShardInfo)
        )
        # Plans arrive here encoded, because every rank gets the same bytes.
        self._run = self._channel.stream_stream(_SERVICE + "Run", None, deserializer(StepResult))
        self._fetch = self._channel.unary_stream(
            _SERVICE + "FetchAdapter", serialize, deserializer(FetchProgress)
        )
        self._drop = self._channel.unary_unary(_SERVICE + "DropAdapter", serialize, None)
        self._tokenizer = self._channel.unary_unary(
            _SERVICE + "GetAdapterTokenizer", serialize, deserializer(AdapterTokenizer)
        )
        self._list = self._channel.unary_unary(
            _SERVICE + "ListAdapters", None, shard_pb2.ListAdaptersReply.FromString
        )

    def __str__(self) -> str:
        return f"shard rank {self.rank} at {self.address}"

    async def describe(self, deadline: float) -> ShardInfo:
        """What the rank serves, once it has loaded. Raises ShardLost at `deadline` (monotonic)."""
        while True:
            left = deadline - time.monotonic()
            try:
                info: ShardInfo = await self._describe(
                    b"", timeout=max(left, 0.0), wait_for_ready=True
                )
                return info
            except aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise ShardLost(f"{self} is not ready: {error.details()}") from error
            await asyncio.sleep(_DESCRIBE_RETRY_SECONDS)

    def run(self) -> Any:
        """Opens the step stream: `write` encoded plans, `read` results."""
        return self._run(None)

    async def fetch(self, request: FetchAdapterRequest) -> AdapterInfo:
        """Raises an adapter to a tier. Raises what `FetchAdapter` can say, as a RequestError."""
        info: AdapterInfo | None = None
        try:
            async for progress in self._fetch(request):
                info = progress.info
        except aio.AioRpcError as error:
            raise self._error(error) from error
        assert info is not None
        return info

    async def drop(self, request: DropAdapterRequest) -> None:
        """Forgets an adapter's copy in a tier and above."""
        try:
            await self._drop(request)
        except aio.AioRpcError as error:
            raise self._error(error) from error

    async def tokenizer(self, key: AdapterKey) -> AdapterTokenizer:
        """What a fetched adapter ships of a tokenizer."""
        try:
            found: AdapterTokenizer = await self._tokenizer(key)
        except aio.AioRpcError as error:
            raise self._error(error) from error
        return found

    async def list_adapters(self) -> list[AdapterInfo]:
        """Adapters the rank can serve without a remote source."""
        try:
            reply = await self._list(b"")
        except aio.AioRpcError as error:
            raise self._error(error) from error
        return [decode(info) for info in reply.adapters]

    async def close(self) -> None:
        """Ends every call."""
        await self._channel.close(None)

    def _error(self, error: aio.AioRpcError) -> RequestError:
        code, details = error.code(), error.details() or error.code().name
        # A rank that is gone and an adapter source that is down share a status.
        is_connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
        if not is_connected or code is grpc.StatusCode.CANCELLED:
            return ShardLost(f"{self} is gone: {details}")
        return _FETCH_ERRORS.get(code, AdapterError)(details)
