"""ShardGroup: the ranks of one tensor-parallel group, as one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from grpc import aio

from lorafleet.proto.codec import serialize
from lorafleet.proto.messages import (
    AdapterInfo,
    AdapterKey,
    AdapterTokenizer,
    DropAdapterRequest,
    FetchAdapterRequest,
    ShardInfo,
    StepPlan,
    StepResult,
    Tier,
)
from lorafleet.router.errors import AdapterChanged, ShardLost
from lorafleet.router.rank import Rank
from lorafleet.router.tasks import all_of

# What may differ between ranks.
_RANK_FIELDS = {"rank", "tokenizer_json", "tokenizer_config_json", "adapter_roots"}


class ShardGroup:
    """A step stream to every rank. A plan goes to all of them; rank 0 answers for the group."""

    def __init__(self, ranks: list[Rank], info: ShardInfo) -> None:
        self.info = info  # rank 0's
        # Done, with the reason, when any rank's stream has ended: a group is whole or gone.
        self.lost: asyncio.Future[ShardLost] = asyncio.get_running_loop().create_future()
        self._ranks = ranks
        self._streams = [rank.run() for rank in ranks]
        self._watchers = [
            asyncio.create_task(self._watch(rank, stream))
            for rank, stream in zip(ranks, self._streams, strict=True)
        ]

    @classmethod
    async def connect(cls, addresses: Sequence[str], timeout_seconds: float) -> ShardGroup:
        """Waits until every rank has loaded, then opens the streams; addresses are rank 0 first.

        Raises ShardLost after `timeout_seconds`, ValueError if the ranks are not one group.
        """
        deadline = time.monotonic() + timeout_seconds
        ranks = [Rank(rank, address) for rank, address in enumerate(addresses)]
        try:
            infos = await all_of(rank.describe(deadline) for rank in ranks)
            _check_group(ranks, infos)
        except BaseException:
            await all_of(rank.close() for rank in ranks)
            raise
        return cls(ranks, infos[0])

    async def send(self, plan: StepPlan) -> None:
        """Sends a plan, encoded once, to every rank. Raises ShardLost."""
        data = serialize(plan)
        try:
            for stream in self._streams:
                await stream.write(data)
        except (aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError) as error:
            raise await self._loss() from error
        except asyncio.CancelledError as error:
            raise await self._reason(error) from error

    async def receive(self) -> StepResult:
        """The next result. Raises ShardLost."""
        try:
            result = await self._streams[0].read()
        except (aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError) as error:
            raise await self._loss() from error
        except asyncio.CancelledError as error:
            raise await self._reason(error) from error
        if not isinstance(result, StepResult):  # the end of the stream
            raise await self._loss()
        return result

    async def fetch(
        self,
        key: AdapterKey,
        tier: Tier,
        api_token: str,
        *,
        refresh: bool = False,
        digest: str = "",
    ) -> AdapterInfo:
        """Raises an adapter to a tier on every rank; its sizes are the largest of all ranks.

        With `refresh` as its source has it now. With a digest, that content where ranks hold it;
        where they do not they tell what there is, and pack nothing else. Raises AdapterError,
        AdapterChanged where ranks have different contents, Overloaded (a tier is full) or
        ShardLost.
        """
        request = FetchAdapterRequest(key, tier, api_token, refresh, digest)
        infos = await all_of(rank.fetch(request) for rank in self._ranks)
        if len({info.digest for info in infos}) > 1:
            raise AdapterChanged(f"adapter {key} has different content on different shards")
        return _merged(infos)

    async def drop(self, key: AdapterKey, tier: Tier, digest: str = "") -> None:
        """Forgets an adapter's copy in a tier and above on every rank. Raises ShardLost.

        With a digest no other content in host memory.
        """
        request = DropAdapterRequest(key, tier, digest)
        await all_of(rank.drop(request) for rank in self._ranks)

    async def tokenizer(self, key: AdapterKey) -> AdapterTokenizer:
        """What a fetched adapter ships of a tokenizer. Raises AdapterError or ShardLost."""
        return await self._ranks[0].tokenizer(key)

    async def list_adapters(self) -> list[AdapterInfo]:
        """Adapters any rank holds, with the largest sizes and the highest tier of all ranks.

        The digest is empty where they have different contents.
        """
        by_key: dict[AdapterKey, list[AdapterInfo]] = {}
        for infos in await all_of(rank.list_adapters() for rank in self._ranks):
            for info in infos:
                by_key.setdefault(info.key, []).append(info)
        return [_merged(infos) for infos in by_key.values()]

    async def close(self) -> None:
        """Ends the streams and the channels."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await all_of(rank.close() for rank in self._ranks)

    async def _watch(self, rank: Rank, stream: Any) -> None:
        code, details = await stream.code(), await stream.details()
        if not self.lost.done():
            self.lost.set_result(ShardLost(f"{rank} is gone: {details or code.name}"))
        for other in self._streams:
            other.cancel()

    async def _loss(self) -> ShardLost:
        return await asyncio.shield(self.lost)

    async def _reason(self, error: asyncio.CancelledError) -> BaseException:
        """What a cancelled read means: this task is being cancelled, or its stream was."""
        task = asyncio.current_task()
        return error if task is not None and task.cancelling() else await self._loss()


def _merged(infos: list[AdapterInfo]) -> AdapterInfo:
    return replace(
        infos[0],
        digest=infos[0].digest if len({info.digest for info in infos}) == 1 else "",
        packed_bytes=max(info.packed_bytes for info in infos),
        disk_bytes=max(info.disk_bytes for info in infos),
        tier=max(info.tier for info in infos),
        piece_bytes=max(info.piece_bytes for info in infos),
        is_public=all(info.is_public for info in infos),
    )


def _check_group(ranks: list[Rank], infos: list[ShardInfo]) -> None:
    for rank, info in zip(ranks, infos, strict=True):
        if (info.rank, info.world_size) != (rank.rank, len(ranks)):
            raise ValueError(
                f"{rank} says it is rank {info.rank} of {info.world_size}, "
                f"but {len(ranks)} shard addresses are given, rank 0 first"
            )
        for field in fields(ShardInfo):
            mine, first = getattr(info, field.name), getattr(infos[0], field.name)
            if field.name not in _RANK_FIELDS and mine != first:
                raise ValueError(f"{rank} has {field.name} {mine}, but rank 0 has {first}")
