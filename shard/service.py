"""ShardService: the RPCs of one rank. Hands plans to the compute thread, never computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lorafleet.cache import errors
from lorafleet.cache.store import AdapterStore
from lorafleet.proto import shard_pb2, shard_pb2_grpc
from lorafleet.proto.codec import decode, encode
from lorafleet.proto.messages import FetchAdapterRequest, FetchProgress, ShardInfo, StepPlan
from lorafleet.shard.background import enter_background
from lorafleet.shard.pace import Pace
from lorafleet.shard.streams import StepStream

log = logging.getLogger(__name__)

SERVICE = "lorafleet.v1.Shard"

# Step stream, queries, and every fetch under way: slow sources must not keep the others waiting for
# a thread, and the router has no more fetches than requests. Threads are made when they are needed.
_MAX_THREADS = 4096
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

_CODES: dict[type[errors.AdapterFault], grpc.StatusCode] = {
    errors.AdapterNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AdapterForbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.AdapterUnservable: grpc.StatusCode.INVALID_ARGUMENT,
    errors.SourceUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.SourceTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.TierFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class ShardService(shard_pb2_grpc.ShardServicer):  # type: ignore[misc]
    """Serves one rank. Starts before the weights are there and says so until `open` is called."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.work: SimpleQueue[tuple[StepStream, StepPlan] | None] = SimpleQueue()
        self._info: ShardInfo | None = None
        self._store: AdapterStore | None = None
        self._stream: StepStream | None = None
        self._lock = Lock()  # guards _stream
        self._pace = pace or Pace()
        self._health = health.HealthServicer()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    @property
    def is_open(self) -> bool:
        """Whether the weights are loaded and every RPC answers."""
        return self._info is not None

    def listen(self, address: str) -> grpc.Server:
        """Starts the server. Raises RuntimeError when the address cannot be bound."""
        server = grpc.server(ThreadPoolExecutor(_MAX_THREADS), options=_OPTIONS)
        shard_pb2_grpc.add_ShardServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        server.add_insecure_port(address)
        server.start()
        return server

    def open(self, info: ShardInfo, store: AdapterStore) -> None:
        """The weights are loaded: from now on every RPC answers."""
        self._info, self._store = info, store
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Ends the step stream and the compute loop."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        with self._lock:
            if self._stream is not None:
                self._stream.close()
        self.work.put(None)

    def Describe(self, request: Any, context: grpc.ServicerContext) -> Any:
        """See shard.proto."""
        if self._info is None:
            _abort(context, grpc.StatusCode.UNAVAILABLE, "weights are still loading")
        return encode(self._info)

    def Run(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """See shard.proto."""
        if self._info is None:
            _abort(context, grpc.StatusCode.UNAVAILABLE, "weights are still loading")
        stream = self._take_over()
        Thread(target=self._read_plans, args=(request_iterator, stream), daemon=True).start()
        for result in stream.results():
            yield encode(result)
        if stream.is_fenced:
            _abort(context, grpc.StatusCode.ABORTED, "a newer stream took this shard over")

    def FetchAdapter(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """See shard.proto."""
        store = self._ready_store(context)
        updates: SimpleQueue[FetchProgress | Exception] = SimpleQueue()
        arguments = (store, decode(request), updates, self._pace)
        Thread(target=_fetch, args=arguments, daemon=True).start()
        while True:
            update = updates.get()
            if isinstance(update, errors.AdapterFault):
                _abort(context, _CODES[type(update)], str(update))
            if isinstance(update, Exception):
                raise update
            yield encode(update)
            if update.info is not None:
                return

    def DropAdapter(self, request: Any, context: grpc.ServicerContext) -> Any:
        """See shard.proto."""
        self._ready_store(context).drop(decode(request))
        return shard_pb2.DropAdapterReply()

    def GetAdapterTokenizer(self, request: Any, context: grpc.ServicerContext) -> Any:
        """See shard.proto."""
        try:
            return encode(self._ready_store(context).tokenizer(decode(request)))
        except errors.AdapterFault as fault:
            _abort(context, _CODES[type(fault)], str(fault))

    def ListAdapters(self, request: Any, context: grpc.ServicerContext) -> Any:
        """See shard.proto."""
        adapters = self._ready_store(context).list()
        return shard_pb2.ListAdaptersReply(adapters=[encode(info) for info in adapters])

    def _take_over(self) -> StepStream:
        with self._lock:
            if self._stream is not None:
                self._stream.close(fenced=True)
            self._stream = StepStream()
            if self._store is not None:  # nobody knows any more what a refresh had superseded
                self._store.drop_superseded()
            return self._stream

    def _read_plans(self, plans: Iterator[Any], stream: StepStream) -> None:
        uses_cores = self._info is not None and self._info.device == "cpu"
        try:
            for message in plans:
                plan = decode(message)
                if uses_cores and plan.rows:
                    self._pace.step()
                self.work.put((stream, plan))
        except grpc.RpcError:  # says no more than that; so does every normal stop
            log.debug("the router left its step stream")
        stream.close()

    def _ready_store(self, context: grpc.ServicerContext) -> AdapterStore:
        if self._store is None:
            _abort(context, grpc.StatusCode.UNAVAILABLE, "weights are still loading")
        return self._store

    def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            self._health.set(name, status)


def _fetch(
    store: AdapterStore,
    request: FetchAdapterRequest,
    updates: SimpleQueue[FetchProgress | Exception],
    pace: Pace,
) -> None:
    def report(progress: FetchProgress) -> None:
        updates.put(progress)
        pace.rest()

    enter_background()
    try:
        info = store.fetch(request, report)
        updates.put(FetchProgress("ready", info.packed_bytes, info.packed_bytes, info))
    except errors.AdapterFault as fault:
        updates.put(type(fault)(str(fault)))  # without the frames, which hold what was read
    except Exception as error:  # whatever it is, it is this fetch's answer
        log.exception("fetching adapter %s failed", request.key)
        updates.put(error)


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, sentence: str) -> NoReturn:
    context.abort(code, sentence)
    raise AssertionError("abort raises")
