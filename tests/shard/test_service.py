"""One real shard process spoken to over gRPC, without a router."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lorafleet.proto import shard_pb2, shard_pb2_grpc
from lorafleet.proto.codec import decode, encode
from lorafleet.proto.lifeline import PARENT_PIPE
from lorafleet.proto.messages import (
    AdapterInfo,
    AdapterKey,
    AdapterMove,
    DropAdapterRequest,
    FetchAdapterRequest,
    SamplingParams,
    SequenceStart,
    StepPlan,
    StepResult,
    Tier,
)
from lorafleet.shard.service import SERVICE, ShardService
from lorafleet.shard.streams import StepStream
from tests.cache.hub_stand_in import Hub, Repo
from tests.checkpoints import RECIPES, make_adapters, make_checkpoint
from tests.e2e.oracle import Oracle

PROMPT = [10, 20, 30, 40, 50]
KEY = AdapterKey("local", "r16-all")
_NUM_SLOW = 80


@dataclass(frozen=True)
class Shard:
    """A shard process, a stub to it, and the folders it serves."""

    process: subprocess.Popen[bytes]
    channel: grpc.Channel
    stub: shard_pb2_grpc.ShardStub
    model: Path
    adapters: Path


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shard]:
    folder = tmp_path_factory.mktemp("shard")
    model = make_checkpoint("llama", folder / "model")
    make_adapters(model, folder / "adapters", RECIPES[3:4])
    address = f"unix:{folder}/shard.sock"
    command = [sys.executable, "-P", "-m", "lorafleet.shard", f"--model-id={model}"]
    command += [f"--listen={address}", f"--adapter-root={folder / 'adapters'}", "--kv-pages=8"]
    environment = os.environ | {PARENT_PIPE: "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as process:
        _check_events(process)
        with grpc.insecure_channel(address) as channel:
            stub = shard_pb2_grpc.ShardStub(channel)
            yield Shard(process, channel, stub, model, folder / "adapters")
        assert process.stdin is not None
        process.stdin.close()  # as when the launcher is gone
        assert process.wait(30) == 0


@contextmanager
def another_shard(shard: Shard, hub: str) -> Iterator[Shard]:
    """A process of its own whose hub is at this address."""
    folder = shard.model.parent
    address = f"unix:{folder}/another.sock"
    command = [sys.executable, "-P", "-m", "lorafleet.shard", f"--model-id={shard.model}"]
    command += [f"--listen={address}", f"--adapter-root={shard.adapters}", "--kv-pages=8"]
    command += [f"--adapter-cache-dir={folder / 'cache'}"]
    environment = os.environ | {"HF_ENDPOINT": hub}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            _check_events(process)
            with grpc.insecure_channel(address) as channel:
                stub = shard_pb2_grpc.ShardStub(channel)
                yield replace(shard, process=process, channel=channel, stub=stub)
        finally:
            process.kill()


def _check_events(process: subprocess.Popen[bytes]) -> None:
    """Reads the start-up events: loading up to the last byte, then ready."""
    assert process.stdout is not None
    last: dict[str, Any] = {}
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "ready":
            break
        last = event
    assert last["event"] == "loading"
    assert last["done_bytes"] == last["total_bytes"] > 0


class Stream:
    """A step stream a test drives by hand."""

    def __init__(self, shard: Shard) -> None:
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._results = shard.stub.Run(map(encode, iter(self._plans.get, None)))

    def step(self, plan: StepPlan) -> StepResult:
        self._plans.put(plan)
        result: StepResult = decode(next(self._results))
        return result

    def send(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def close(self) -> None:
        self._plans.put(None)
        assert list(self._results) == []


def prefill(slot: int = 0, moves: list[AdapterMove] | None = None) -> StepPlan:
    start = SequenceStart(1, PROMPT, len(PROMPT), SamplingParams())
    return StepPlan(1, [start], moves or [], 1, [1], [0], [len(PROMPT)], [slot], [True], [1], [3])


def decode_step(step: int, slot: int = 0) -> StepPlan:
    position = len(PROMPT) + step - 2
    return StepPlan(step, [], [], 0, [1], [position], [1], [slot], [True], [0], [])


def generate(stream: Stream, num_tokens: int, slot: int = 0) -> list[int]:
    tokens = stream.step(prefill(slot)).tokens
    for step in range(2, num_tokens + 1):
        tokens += stream.step(decode_step(step, slot)).tokens
    return tokens


def fetch(shard: Shard, tier: Tier) -> AdapterInfo:
    *_, last = shard.stub.FetchAdapter(encode(FetchAdapterRequest(KEY, tier)))
    info: AdapterInfo = decode(last).info
    return info


def test_describe_says_what_is_served(shard: Shard) -> None:
    info = decode(shard.stub.Describe(shard_pb2.DescribeRequest()))
    assert (info.architecture, info.dtype, info.device) == ("LlamaForCausalLM", "float32", "cpu")
    assert (info.num_pages, info.page_size, info.vocab_size) == (8, 16, 259)
    assert info.eos_token_ids == [2]
    assert json.loads(info.tokenizer_json)["model"]["type"] == "BPE"


def test_health_and_reflection_are_the_standard_ones(shard: Shard) -> None:
    health = health_pb2_grpc.HealthStub(shard.channel)
    for name in ("", SERVICE):
        status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(shard.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection.ServerReflectionInfo(iter([request]))
    assert SERVICE in {service.name for service in answer.list_services_response.service}


def test_tokens_are_transformers_tokens_and_never_travel(shard: Shard) -> None:
    oracle = Oracle(shard.model, shard.adapters, [KEY.id])
    stream = Stream(shard)
    assert generate(stream, 6) == oracle.answer(PROMPT, None, 6)
    stream.close()


def test_an_adapter_climbs_the_tiers_and_acts(shard: Shard) -> None:
    updates = [
        decode(u) for u in shard.stub.FetchAdapter(encode(FetchAdapterRequest(KEY, Tier.DISK)))
    ]
    assert (updates[-1].info.tier, updates[-1].info.rank) == (Tier.DISK, 16)
    updates = [
        decode(u) for u in shard.stub.FetchAdapter(encode(FetchAdapterRequest(KEY, Tier.HOST)))
    ]
    assert updates[-1].info.tier == Tier.HOST
    oracle = Oracle(shard.model, shard.adapters, [KEY.id])
    stream = Stream(shard)
    info = updates[-1].info
    assert 0 < info.piece_bytes < info.packed_bytes // 2
    half = info.packed_bytes // 512 * 256 + info.piece_bytes  # it must be cut somewhere
    move = AdapterMove(KEY, 5, [256 + 2 * half, 256], [half, half], info.digest)
    loaded = stream.step(StepPlan(1, moves=[move]))
    assert loaded.ready_slots == [5]
    assert generate(stream, 6, slot=5) == oracle.answer(PROMPT, KEY.id, 6)
    assert generate(stream, 6) == oracle.answer(PROMPT, None, 6)
    stream.close()
    shard.stub.DropAdapter(encode(DropAdapterRequest(KEY, Tier.HOST)))
    listed = decode(shard.stub.ListAdapters(shard_pb2.ListAdaptersRequest()).adapters[0])
    assert (listed.key, listed.tier) == (KEY, Tier.DISK)


def test_a_newer_stream_fences_off_the_older(shard: Shard) -> None:
    older, newer = Stream(shard), Stream(shard)
    tokens = generate(newer, 3)
    with pytest.raises(grpc.RpcError) as caught:
        older.step(prefill())
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert "newer stream" in str(caught.value.details())
    again = Stream(shard)
    assert generate(again, 3) == tokens
    for _ in range(2000):  # more than are computed before the next stream makes them void
        again.send(prefill())
    last = Stream(shard)
    assert generate(last, 3) == tokens
    last.close()


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (AdapterKey("local", "no-such-adapter"), grpc.StatusCode.NOT_FOUND),
        (AdapterKey("local", "../model"), grpc.StatusCode.NOT_FOUND),
        (AdapterKey("carrier-pigeon", "a"), grpc.StatusCode.NOT_FOUND),
    ],
)
def test_a_bad_adapter_is_an_answer_not_a_failure(
    shard: Shard, key: AdapterKey, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(shard.stub.FetchAdapter(encode(FetchAdapterRequest(key, Tier.HOST))))
    assert caught.value.code() == code
    assert caught.value.details()
    stream = Stream(shard)
    assert len(generate(stream, 2)) == 2
    stream.close()


def test_many_slow_downloads_delay_nobody(shard: Shard) -> None:
    """Each holds a thread of the shard for as long as its source trickles."""
    with Hub().serve() as hub, ExitStack() as stack:
        for number in range(_NUM_SLOW):
            repo = hub.repos[f"slow/{number}"] = Repo(shard.adapters / KEY.id)
            repo.trickle_seconds = 0.2
        own = stack.enter_context(another_shard(shard, hub.endpoint))
        calls = [
            own.stub.FetchAdapter(
                encode(FetchAdapterRequest(AdapterKey("hub", f"slow/{number}"), Tier.HOST))
            )
            for number in range(_NUM_SLOW)
        ]
        for call in calls:
            stack.callback(call.cancel)
        deadline = time.monotonic() + 60
        while hub.count("GET /slow/") < _NUM_SLOW:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = time.monotonic()
        assert fetch(own, Tier.HOST).tier == Tier.HOST
        assert decode(own.stub.Describe(shard_pb2.DescribeRequest())).rank == 0
        assert time.monotonic() - started < 5
        assert not any(call.done() for call in calls)


def test_an_error_in_the_compute_loop_ends_the_process(shard: Shard, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/shard.sock"
    command = [sys.executable, "-P", "-m", "lorafleet.shard", f"--model-id={shard.model}"]
    command.append(f"--listen={address}")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        _check_events(process)
        with grpc.insecure_channel(address) as channel:
            own = replace(shard, process=process, channel=channel)
            stream = Stream(replace(own, stub=shard_pb2_grpc.ShardStub(channel)))
            # of an adapter that is not in host memory
            move = AdapterMove(AdapterKey("local", "x"), 1, [0], [256], "digest")
            with pytest.raises(grpc.RpcError):
                stream.step(StepPlan(1, moves=[move]))
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert b"step 1 failed: 0 starts, 1 moves" in process.stderr.read()


def test_a_router_that_leaves_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    def gone(_: int) -> Any:
        raise grpc.RpcError

    stream = StepStream()
    with caplog.at_level(logging.DEBUG):
        ShardService()._read_plans(map(gone, [0]), stream)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "the router left its step stream")
    ]
    assert not stream.is_open
