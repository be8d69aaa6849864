"""The engine over a real gRPC stream to a fake shard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from lorafleet.proto.messages import AdapterKey, SamplingParams, Tier
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.errors import GenerationFailed, InvalidRequest, ShardLost
from lorafleet.router.generation import Generation
from lorafleet.router.request import FinishReason, GenerationRequest
from tests.fakes import FakeConfig, FakeShard


@asynccontextmanager
async def serving(*shards: FakeShard, **options: Any) -> AsyncIterator[Engine]:
    """An engine on these ranks; its ledgers must balance in the end."""
    addresses = tuple(shard.address for shard in shards)
    config = RouterConfig(shards=addresses, shard_connect_seconds=20.0, **options)
    engine = await Engine.start(config)
    try:
        yield engine
        if engine.failure is None:
            engine.check()
    finally:
        await engine.close()


def request(
    prompt: list[int], max_new_tokens: int = 8, adapter: str = "", **sampling: Any
) -> GenerationRequest:
    key = AdapterKey("local", adapter) if adapter else None
    return GenerationRequest(prompt, SamplingParams(**sampling), max_new_tokens, key)


async def collect(engine: Engine, asked: GenerationRequest) -> list[int]:
    async with await engine.submit(asked) as generation:
        return [event.token_id async for event in generation]


async def test_concurrent_requests_get_their_own_tokens_on_two_ranks() -> None:
    config = FakeConfig(num_shard=2, num_slots=2, num_pages=64, max_rows=6)
    with FakeShard(config) as first, FakeShard(replace(config, rank=1)) as second:
        async with serving(first, second) as engine:
            asked = [
                request([5 + i, 6, 7] * (1 + i % 9), 20, ["", "adapter-1", "adapter-2"][i % 3])
                for i in range(24)
            ]
            answers = await asyncio.gather(*(collect(engine, one) for one in asked))
            for one, tokens in zip(asked, answers, strict=True):
                expected = first.config.model().expected_tokens(one.prompt_ids, 20, one.adapter)
                assert tokens == expected
            await second.saw(lambda: len(second.plans) == len(first.plans))
            assert list(second.plans) == list(first.plans)
            assert engine.stats().max_adapters_in_step == 2


async def test_a_generation_tells_its_times_finish_and_prompt_logprobs() -> None:
    with FakeShard(FakeConfig(eos_after=3)) as shard:
        async with serving(shard) as engine:
            asked = request([5, 6, 7], 9, prompt_logprobs=True, num_top_logprobs=1)
            async with await engine.submit(asked) as generation:
                first = await anext(generation)
                assert generation.prompt_logprobs == [-0.875, -0.125]
                assert first.top == ((first.token_id, first.logprob),)
                rest = [event async for event in generation]
            assert rest[-1].finish is FinishReason.EOS_TOKEN
            assert len(rest) == 2
            times = (generation.submitted_at, generation.started_at, generation.first_token_at)
            assert list(times) == sorted(times)
            assert generation.queue_seconds >= 0


async def test_leaving_frees_everything_within_a_step() -> None:
    with FakeShard(FakeConfig(max_rows=2)) as shard:
        async with serving(shard) as engine:
            async with await engine.submit(request([5, 6], 1000, "adapter-1")) as generation:
                await anext(generation)
                shard.steps.close()
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0)
            engine.check()
            generation.close()
            shard.steps.open()
            assert len(await collect(engine, request([5, 6], 4))) == 4


async def test_cancelling_a_handler_aborts_its_request() -> None:
    with FakeShard() as shard:
        async with serving(shard) as engine:
            shard.steps.close()
            task = asyncio.create_task(collect(engine, request([5, 6], 100)))
            await shard.saw(lambda: len(shard.plans) > 0)
            assert engine.stats().running == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.stats().running == 0
            shard.steps.open()


async def test_a_request_that_can_never_fit_is_refused() -> None:
    with FakeShard(FakeConfig(num_pages=4, max_model_len=100)) as shard:
        async with serving(shard) as engine:
            for asked, field, words in (
                (request([], 4), "inputs", "at least 1 token"),
                (request([5], 0), "max_new_tokens", "at least 1"),
                (request([259], 4), "inputs", "between 0 and 258"),
                (request([5] * 60, 6), "max_new_tokens", "at most 65 tokens"),
                (request([5] * 60, 50), "max_new_tokens", "the model takes 100"),
            ):
                with pytest.raises(InvalidRequest, match=words) as caught:
                    await engine.submit(asked)
                assert caught.value.field == field
            assert len(await collect(engine, request([5] * 60, 5))) == 5


async def test_a_poisoned_sequence_fails_alone() -> None:
    with FakeShard(FakeConfig(poison_id=9)) as shard:
        async with serving(shard) as engine:
            bad, good = await asyncio.gather(
                collect(engine, request([5, 9])),
                collect(engine, request([5, 6])),
                return_exceptions=True,
            )
            assert isinstance(bad, GenerationFailed)
            assert isinstance(good, list)
            assert len(good) == 8


@pytest.mark.parametrize("dying", [0, 1])
async def test_a_lost_rank_fails_every_generation_and_the_engine(dying: int) -> None:
    config = FakeConfig(num_shard=2)
    shards = [FakeShard(replace(config, rank=rank)) for rank in range(2)]
    with shards[0], shards[1]:
        async with serving(*shards) as engine:
            generations = [await engine.submit(request([5, 6], 1000)) for _ in range(3)]
            await anext(generations[0])
            await asyncio.to_thread(shards[dying].stop)
            for generation in generations:
                with pytest.raises(ShardLost, match=f"shard rank {dying}"):
                    await _drain(generation)
            await asyncio.wait_for(engine.failed.wait(), 20)
            with pytest.raises(ShardLost):
                await engine.submit(request([5, 6]))


async def test_an_idle_engine_notices_a_lost_shard() -> None:
    with FakeShard() as shard:
        async with serving(shard) as engine:
            await asyncio.to_thread(shard.stop)
            await asyncio.wait_for(engine.failed.wait(), 20)
            assert "shard rank 0" in str(engine.failure)


async def test_closing_ends_generations_without_calling_it_a_failure() -> None:
    with FakeShard() as shard:
        async with serving(shard) as engine:
            generation = await engine.submit(request([5, 6], 1000))
            await engine.close()
            with pytest.raises(ShardLost, match="shutting down"):
                await _drain(generation)
            assert not engine.failed.is_set()


async def test_stats_and_adapters_tell_where_adapters_are() -> None:
    with FakeShard(FakeConfig(num_slots=1)) as shard:
        async with serving(shard) as engine:
            await collect(engine, request([5, 6], 2, "adapter-1"))
            await collect(engine, request([5, 6], 2, "adapter-2"))
            stats = engine.stats()
            where = {status.key.id: (status.tier, status.slot) for status in stats.adapters}
            assert where == {"adapter-1": (Tier.HOST, 0), "adapter-2": (Tier.DEVICE, 1)}
            assert stats.tiers[Tier.DEVICE].num_evictions == 1
            assert [info.key.id for info in await engine.adapters()] == ["adapter-1", "adapter-2"]


async def test_a_group_must_be_the_one_it_says() -> None:
    config = FakeConfig(num_shard=2)
    with FakeShard(config) as first, FakeShard(replace(config, rank=1, num_pages=7)) as second:
        with pytest.raises(ValueError, match="num_pages 7, but rank 0 has 4096"):
            await Engine.start(RouterConfig(shards=(first.address, second.address)))
        with pytest.raises(ValueError, match="rank 0 first"):
            await Engine.start(RouterConfig(shards=(second.address, first.address)))


async def test_the_engine_waits_for_shards_to_load() -> None:
    with FakeShard() as shard:
        shard.loading = True
        config = RouterConfig(shards=(shard.address,), shard_connect_seconds=0.3)
        with pytest.raises(ShardLost, match="not ready"):
            await Engine.start(config)
        starting = asyncio.create_task(Engine.start(replace(config, shard_connect_seconds=20.0)))
        await asyncio.sleep(0)
        shard.loading = False
        await (await starting).close()


async def _drain(generation: Generation) -> None:
    async for _ in generation:
        pass
