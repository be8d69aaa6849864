"""FakeShard: the real gRPC service with deterministic tokens and no torch.

In a test: `with FakeShard(FakeConfig(...)) as shard:` and give `shard.address` to the router.
As a process: `python -m tests.fakes --listen 127.0.0.1:7400`; it prints a ready line and ends when
its stdin does.

Adapters `adapter-0` .. `adapter-{num_adapters-1}` exist in every source, take
`adapter_bytes * (1 + N % 3)` packed bytes and, from the hub, as many on disk. `private-N` is the
same but needs the api_token "secret". `missing`, `broken`, `down` and `slow` fail with the status
of their name; any other id is NOT_FOUND. Merged adapters are made of any of them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from argparse import ArgumentParser
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import grpc

from lorafleet.cache.merging.recipe import members_of
from lorafleet.proto import shard_pb2
from lorafleet.proto.codec import deserializer, encode, serialize
from lorafleet.proto.flags import add_flags, flag, from_flags
from lorafleet.proto.messages import (
    AdapterContent,
    AdapterInfo,
    AdapterKey,
    AdapterTokenizer,
    DropAdapterRequest,
    FetchAdapterRequest,
    FetchProgress,
    ShardInfo,
    StepPlan,
    StepResult,
    Tier,
)
from tests.fake_model import EOS_ID, FakeModel, FakeRows
from tests.fake_tokenizer import VOCAB_SIZE, tokenizer_config_json, tokenizer_json

SECRET = "secret"
_FAULTS = {
    "missing": (grpc.StatusCode.NOT_FOUND, "the source has no adapter missing"),
    "broken": (grpc.StatusCode.INVALID_ARGUMENT, "adapter broken: use_dora is not supported"),
    "down": (grpc.StatusCode.UNAVAILABLE, "the source is not reachable"),
    "slow": (grpc.StatusCode.DEADLINE_EXCEEDED, "the source did not answer within 30 s"),
}


@dataclass(frozen=True, slots=True)
class FakeConfig:
    """Fake shard: sizes it reports and how it behaves."""

    listen: str = flag("127.0.0.1:0", "gRPC address; port 0 = any free one")
    rank: int = flag(0, "this shard's rank")
    num_shard: int = flag(1, "ranks in the group")
    max_model_len: int = flag(2048, "tokens a sequence may hold")
    page_size: int = flag(16, "tokens in a KV page")
    num_pages: int = flag(4096, "KV pages")
    max_rows: int = flag(256, "sequences that run at once")
    max_step_tokens: int = flag(1024, "tokens one step may compute")
    num_slots: int = flag(4, "adapter slots")
    adapter_bytes: int = flag(4096, "smallest packed adapter")
    num_adapters: int = flag(16, "adapters that exist")
    arena_bytes: int = flag(1 << 20, "device bytes for adapters")
    host_bytes: int = flag(1 << 20, "host bytes for adapters")
    disk_bytes: int = flag(1 << 20, "disk bytes for downloaded adapters")
    adapter_root: str = flag("/srv/adapters", "where it says local adapters are")
    step_seconds: float = flag(0.0, "time a step takes")
    echo: bool = flag(False, "repeat the prompt instead of the formula's tokens")
    eos_after: int = flag(0, "end sequences after this many generated tokens; 0 = never")
    poison_id: int = flag(-1, "a prompt ending in this id has non-finite logits")

    def info(self) -> ShardInfo:
        """What Describe answers."""
        return ShardInfo(
            model_id="fake", architecture="FakeForCausalLM", dtype="float32", device="cpu",
            rank=self.rank, world_size=self.num_shard, vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len, page_size=self.page_size, num_pages=self.num_pages,
            max_rows=self.max_rows, max_step_tokens=self.max_step_tokens,
            num_slots=self.num_slots, arena_bytes=self.arena_bytes, host_bytes=self.host_bytes,
            disk_bytes=self.disk_bytes, eos_token_ids=[EOS_ID], tokenizer_json=tokenizer_json(),
            tokenizer_config_json=tokenizer_config_json(), model_revision="",
            arena_alignment=256, adapter_roots=list(filter(None, [self.adapter_root])),
        )  # fmt: skip

    def model(self) -> FakeModel:
        """The function it computes."""
        return FakeModel(self.echo, self.eos_after, self.poison_id)


class Gate:
    """A door in the fake's threads that a test opens and closes."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()

    def close(self) -> None:
        """Whoever comes waits."""
        self._open.clear()

    def open(self) -> None:
        """Whoever waits goes on."""
        self._open.set()

    def wait(self) -> None:
        """Passes when open."""
        self._open.wait()


class FakeShard:
    """One rank. `steps` and `fetching` are gates; what it was asked is recorded for tests.

    Owned by the gRPC threads while serving: `info`, `plans`, `fetches`, `drops`, `adapters`.
    """

    def __init__(self, config: FakeConfig | None = None) -> None:
        self.config = config or FakeConfig()
        self.info = self.config.info()
        self.address = self.config.listen
        self.loading = False  # Describe answers UNAVAILABLE
        self.steps, self.fetching = Gate(), Gate()
        self.plans: deque[StepPlan] = deque(maxlen=1000)
        self.fetches: list[FetchAdapterRequest] = []
        self.drops: list[DropAdapterRequest] = []
        self.adapters: dict[AdapterKey, AdapterInfo] = {}
        self.superseded: dict[AdapterContent, AdapterInfo] = {}  # in host memory still
        self.contents: dict[str, str] = {}  # id -> digest, for an adapter that changes
        self.tokenizers: dict[str, AdapterTokenizer] = {}  # id -> what the adapter ships
        self.vocab_sizes: dict[str, int] = {}  # id -> tokens it has
        self.num_tokenizers_asked = 0
        self._changed = threading.Condition()  # guards the records above
        self._stream: Any = None  # the live Run call's context
        self._server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((_handlers(self),))

    def start(self) -> str:
        """Listens; returns the address."""
        port = self._server.add_insecure_port(self.config.listen)
        if not self.config.listen.startswith("unix:"):
            self.address = f"{self.config.listen.rpartition(':')[0]}:{port}"
        self._server.start()
        return self.address

    def stop(self) -> None:
        """Dies at once: every call is cut off."""
        self.steps.open()
        self.fetching.open()
        self._server.stop(None).wait()

    async def saw(self, condition: Callable[[], bool]) -> None:
        """Returns once a condition on what was asked (plans, fetches, drops) holds."""

        def wait() -> None:
            with self._changed:
                assert self._changed.wait_for(condition, timeout=60)

        await asyncio.to_thread(wait)

    def held(self) -> set[AdapterContent]:
        """What host memory has."""
        present = (info for info in self.adapters.values() if info.tier is Tier.HOST)
        return {info.content for info in (*present, *self.superseded.values())}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def describe(self, request: Any, context: Any) -> ShardInfo:
        """Describe."""
        if self.loading:
            context.abort(grpc.StatusCode.UNAVAILABLE, "weights are loading")
        return self.info

    def run(self, plans: Iterator[StepPlan], context: Any) -> Iterator[StepResult]:
        """Run: a new stream ends the older one; only rank 0 answers."""
        with self._changed:
            older, self._stream = self._stream, context
        if older is not None:
            older.cancel()
        rows = FakeRows(self.config.model())
        for plan in plans:
            with self._changed:
                self.plans.append(plan)
                self._changed.notify_all()
                self._check_moves(plan)
            self.steps.wait()
            if self.config.step_seconds:
                time.sleep(self.config.step_seconds)
            result = rows.step(plan)
            if self.config.rank == 0:
                yield result

    def _check_moves(self, plan: StepPlan) -> None:
        """A rank that is behind need not have what no row uses: it may be evicted again."""
        held, is_behind = self.held(), self.config.rank > 0
        for move in plan.moves:
            is_there = AdapterContent(move.key, move.digest) in held
            assert is_there or (is_behind and move.slot not in plan.slots), (
                "a move of what is not in host memory"
            )

    def fetch(self, request: FetchAdapterRequest, context: Any) -> Iterator[FetchProgress]:
        """FetchAdapter."""
        with self._changed:
            self.fetches.append(request)
            self._changed.notify_all()
        yield FetchProgress("reading", 0, 100)
        self.fetching.wait()
        info = self._find(request, context)
        with self._changed:
            info = self._put(info, request)
            full = self._full_tier()
            if full:
                del self.adapters[info.key]
        if full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the {full} tier is full")
        yield FetchProgress("packing", 100, 100, info)

    def _put(self, info: AdapterInfo, request: FetchAdapterRequest) -> AdapterInfo:
        """Host memory has a content until it is dropped, whatever the source has by now."""
        key, held = info.key, self.adapters.get(info.key)
        is_held = held is not None and held.tier is Tier.HOST
        if not request.refresh:
            asked = self.superseded.get(AdapterContent(key, request.digest))
            if asked is not None:
                return asked
            if held and is_held and request.digest in ("", held.digest):
                info = held
        if held and held.digest != info.digest:
            if is_held:
                self.superseded[held.content] = held
            held = self.superseded.pop(info.content, None)
        tier = request.tier if request.digest in ("", info.digest) else Tier.DISK
        self.adapters[key] = info = replace(info, tier=max(tier, held.tier if held else tier))
        return info

    def drop(self, request: DropAdapterRequest, context: Any) -> None:
        """DropAdapter."""
        with self._changed:
            self.drops.append(request)
            self._changed.notify_all()
            held = self.adapters.get(request.key)
            if held is not None and request.digest in ("", held.digest):
                del self.adapters[request.key]
                if request.tier > Tier.DISK:
                    self.adapters[request.key] = replace(held, tier=Tier(request.tier - 1))
            for content in list(self.superseded):
                if content.key == request.key and request.digest in ("", content.digest):
                    del self.superseded[content]

    def _find(self, request: FetchAdapterRequest, context: Any) -> AdapterInfo:
        if members := members_of(request.key):
            return self._merge(request, members, context)
        kind, _, number = request.key.id.partition("-")
        if request.key.id in _FAULTS:
            context.abort(*_FAULTS[request.key.id])
        if kind not in ("adapter", "private") or not number.isdigit():
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no adapter {request.key}")
        if int(number) >= self.config.num_adapters:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no adapter {request.key}")
        if kind == "private" and request.api_token != SECRET:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"no access to {request.key}")
        nbytes = self.config.adapter_bytes * (1 + int(number) % 3)
        digest = self.contents.get(request.key.id, f"digest of {request.key}")
        disk = nbytes if request.key.source == "hub" else 0
        ships = self.tokenizers.get(request.key.id)
        return AdapterInfo(
            request.key, digest, 8, nbytes, disk, ["q_proj"], request.tier,
            vocab_size=self.vocab_sizes.get(request.key.id, 0),
            tokenizer_digest=ships.digest if ships else "",
        )  # fmt: skip

    def tokenizer(self, key: AdapterKey, context: Any) -> AdapterTokenizer:
        """GetAdapterTokenizer."""
        with self._changed:
            self.num_tokenizers_asked += 1
        return self.tokenizers[key.id]

    def _merge(
        self, request: FetchAdapterRequest, members: tuple[AdapterKey, ...], context: Any
    ) -> AdapterInfo:
        """As large as the largest member; members are fetched where they are not there."""
        infos = [self._find(replace(request, key=key), context) for key in members]
        with self._changed:
            for info in infos:
                self.adapters.setdefault(info.key, replace(info, tier=Tier.DISK))
        nbytes = max(info.packed_bytes for info in infos)
        digest = " + ".join(info.digest for info in infos)
        return AdapterInfo(request.key, digest, 8, nbytes, nbytes, ["q_proj"], request.tier)

    def _full_tier(self) -> str:
        """The name of a tier over its budget, or ""."""
        held = list(self.adapters.values())
        packed = [*(i for i in held if i.tier >= Tier.HOST), *self.superseded.values()]
        if sum(i.packed_bytes for i in packed) > self.info.host_bytes:
            return "host"
        return "disk" if sum(i.disk_bytes for i in held) > self.info.disk_bytes else ""


def _handlers(shard: FakeShard) -> grpc.GenericRpcHandler[Any, Any]:
    def drop(request: DropAdapterRequest, context: Any) -> Any:
        shard.drop(request, context)
        return shard_pb2.DropAdapterReply()

    def list_adapters(request: Any, context: Any) -> Any:
        return shard_pb2.ListAdaptersReply(
            adapters=[
                encode(replace(info, is_public=not info.key.id.startswith("private-")))
                for info in list(shard.adapters.values())
            ]
        )

    def proto(message: Any) -> bytes:
        data: bytes = message.SerializeToString()
        return data

    ignore: Callable[[bytes], bytes] = lambda data: data  # noqa: E731
    return grpc.method_handlers_generic_handler(
        "lorafleet.v1.Shard",
        {
            "Describe": grpc.unary_unary_rpc_method_handler(shard.describe, ignore, serialize),
            "Run": grpc.stream_stream_rpc_method_handler(
                shard.run, deserializer(StepPlan), serialize
            ),
            "FetchAdapter": grpc.unary_stream_rpc_method_handler(
                shard.fetch, deserializer(FetchAdapterRequest), serialize
            ),
            "DropAdapter": grpc.unary_unary_rpc_method_handler(
                drop, deserializer(DropAdapterRequest), proto
            ),
            "GetAdapterTokenizer": grpc.unary_unary_rpc_method_handler(
                shard.tokenizer, deserializer(AdapterKey), serialize
            ),
            "ListAdapters": grpc.unary_unary_rpc_method_handler(list_adapters, ignore, proto),
        },
    )


def main() -> None:
    """Serves until stdin ends."""
    parser = ArgumentParser("python -m tests.fakes", description=__doc__)
    add_flags(parser, FakeConfig)
    with FakeShard(from_flags(FakeConfig, parser.parse_args())) as shard:
        print(json.dumps({"event": "ready", "address": shard.address}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
