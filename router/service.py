"""What every handler works with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from time import perf_counter

from aiohttp import web

from lorafleet.proto.messages import AdapterKey, ShardInfo
from lorafleet.router.adapter import AdapterHold, num_tokens
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.aliases import Aliases
from lorafleet.router.concurrency import Concurrency
from lorafleet.router.config import RouterConfig
from lorafleet.router.deadline import Deadline
from lorafleet.router.engine import Engine
from lorafleet.router.errors import AdapterChanged, InvalidRequest
from lorafleet.router.event_stream import KeepAlive
from lorafleet.router.generation import Generation
from lorafleet.router.metrics import Metrics
from lorafleet.router.preload import configured_names
from lorafleet.router.prompt_form import PromptForm
from lorafleet.router.prompt_forms import PromptForms
from lorafleet.router.request import GenerationRequest
from lorafleet.router.stops import StopStrings
from lorafleet.router.text import Completion
from lorafleet.router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Addressee:
    """The base model or the adapter a request speaks to, and how it is spoken to."""

    hold: AdapterHold
    form: PromptForm
    info: ShardInfo

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return self.form.tokenizer

    @property
    def num_tokens(self) -> int:
        """Token ids its prompts may hold."""
        return num_tokens(self.info, self.hold.adapter)


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one router process; built once, shared by all handlers."""

    engine: Engine
    config: RouterConfig
    forms: PromptForms
    concurrency: Concurrency
    keep_alive: KeepAlive
    metrics: Metrics
    names: AdapterNames
    started_at: int  # seconds since the epoch

    @classmethod
    def of(cls, engine: Engine, config: RouterConfig) -> Service:
        """Around an engine that is connected. Raises ValueError for an alias that cannot be."""
        info = engine.info
        metrics = Metrics()
        metrics.watch(engine.stats, engine.activity.metrics)
        return cls(
            engine=engine,
            config=config,
            forms=PromptForms(info, config.validation_workers, engine.tokenizer),
            concurrency=Concurrency(config.max_concurrent_requests),
            keep_alive=KeepAlive(),
            metrics=metrics,
            names=configured_names(config, info),
            started_at=int(time.time()),
        )

    @property
    def aliases(self) -> Aliases:
        """Names that operators gave."""
        return self.names.aliases

    async def check_hides_nothing(self, field: str, alias: str, key: AdapterKey) -> None:
        """Raises InvalidRequest if a new alias of `key` were to take another adapter's name."""
        hidden = self.names.hidden_by(alias, key) if alias not in self.aliases else None
        if hidden is not None and await self.engine.holds(hidden):
            raise InvalidRequest(f"`{field}` {alias!r} is the name of an adapter", field)

    @asynccontextmanager
    async def addressed(
        self, adapter: AdapterKey | None, api_token: str, deadline: Deadline
    ) -> AsyncIterator[Addressee]:
        """Whom a request speaks to, held for as long as its generations are being started.

        Raises AdapterError, Overloaded, DeadlineExceeded or ShardLost.
        """
        try:
            held, form = await self._held(adapter, api_token, deadline)
        except AdapterChanged:  # by a reload, before its tokenizer was read
            held, form = await self._held(adapter, api_token, deadline)
        try:
            yield Addressee(held, form, self.engine.info)
        finally:
            held.close()

    async def _held(
        self, adapter: AdapterKey | None, api_token: str, deadline: Deadline
    ) -> tuple[AdapterHold, PromptForm]:
        hold = await self.engine.hold(adapter, api_token, deadline)
        try:
            return hold, await self._form(hold, deadline)
        except BaseException:
            hold.close()
            raise

    async def _form(self, hold: AdapterHold, deadline: Deadline) -> PromptForm:
        try:
            async with asyncio.timeout_at(deadline.when):
                return await self.forms.of(hold.adapter)
        except TimeoutError:
            raise deadline.error() from None

    async def start(
        self, stack: AsyncExitStack, request: GenerationRequest, to: Addressee
    ) -> Generation:
        """Starts a generation that ends with `stack`. Raises RequestError."""
        return await stack.enter_async_context(await self.engine.submit(request, to.hold))

    def completion(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        stops: list[str],
        received_at: float,
        *,
        keep_stops: bool,
    ) -> Completion:
        """The text-to-be of a request's generation."""
        return Completion(
            tokenizer.detokenizer(request.prompt_ids),
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

    def validated(self, waited_seconds: float) -> None:
        """The body is parsed and tokenized; it was waited so long for an adapter meanwhile."""
        self.validated_at = perf_counter() - waited_seconds

    @property
    def validation_seconds(self) -> float:
        """What parsing and tokenizing took."""
        return self.validated_at - self.received_at
