"""What every handler works with."""

from __future__ import annotations

import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from time import perf_counter

from aiohttp import web

from lorafleet.router.aliases import Aliases
from lorafleet.router.chat import ChatTemplate
from lorafleet.router.concurrency import Concurrency
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.event_stream import KeepAlive
from lorafleet.router.generation import Generation
from lorafleet.router.metrics import Metrics
from lorafleet.router.request import GenerationRequest
from lorafleet.router.stops import StopStrings
from lorafleet.router.text import Completion
from lorafleet.router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one router process; built once, shared by all handlers."""

    engine: Engine
    config: RouterConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    concurrency: Concurrency
    keep_alive: KeepAlive
    metrics: Metrics
    aliases: Aliases
    started_at: int  # seconds since the epoch

    @classmethod
    def of(cls, engine: Engine, config: RouterConfig) -> Service:
        """Around an engine that is connected."""
        info = engine.info
        metrics = Metrics()
        metrics.watch(engine.stats, engine.activity.metrics)
        return cls(
            engine=engine,
            config=config,
            tokenizer=Tokenizer(info.tokenizer_json, config.validation_workers),
            chat_template=ChatTemplate(json.loads(info.tokenizer_config_json or b"{}")),
            concurrency=Concurrency(config.max_concurrent_requests),
            keep_alive=KeepAlive(),
            metrics=metrics,
            aliases=Aliases(),
            started_at=int(time.time()),
        )

    async def start(self, stack: AsyncExitStack, request: GenerationRequest) -> Generation:
        """Starts a generation that ends with `stack`. Raises RequestError."""
        return await stack.enter_async_context(await self.engine.submit(request))

    def completion(
        self, request: GenerationRequest, stops: list[str], received_at: float, *, keep_stops: bool
    ) -> Completion:
        """The text-to-be of a request's generation."""
        return Completion(
            self.tokenizer.detokenizer(request.prompt_ids),
            StopStrings(stops, keep=keep_stops),
            self.metrics,
            received_at,
        )


SERVICE = web.AppKey("service", Service)


@dataclass(slots=True)
class Clock:
    """When a request came and when it was valid, in `perf_counter` seconds."""

    received_at: float
    validated_at: float = 0.0

    @classmethod
    def start(cls) -> Clock:
        """Now."""
        return cls(perf_counter())

    def validated(self) -> None:
        """The body is parsed and tokenized."""
        self.validated_at = perf_counter()

    @property
    def validation_seconds(self) -> float:
        """What parsing and tokenizing took."""
        return self.validated_at - self.received_at
