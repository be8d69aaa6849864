"""One streaming request to a server, and when each piece of its answer came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from lorafleet.deploy.bench.workload import Ask
from lorafleet.deploy.server_url import what_failed

BASE = "base"  # the adapter name that means none
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=600)


class ServerError(Exception):
    """The server answered with an error."""


@dataclass(slots=True)
class Outcome:
    """What became of one request; times are seconds on this machine's monotonic clock."""

    adapter: str
    sent_at: float
    arrivals: list[float] = field(default_factory=list)  # of each piece with new tokens
    finished_at: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def first_token_seconds(self) -> float:
        """From sending to the first piece."""
        return self.arrivals[0] - self.sent_at

    @property
    def total_seconds(self) -> float:
        """From sending to the end of the answer."""
        return self.finished_at - self.sent_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Target:
    """A server, spoken to the OpenAI way (/v1/completions) or LoRAX's (/generate_stream)."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, api: str, model: str, ignore_eos: bool
    ) -> None:
        self._session = session
        self._api = api
        self._model = model  # what the OpenAI API calls the base model
        self._ignore_eos = ignore_eos
        self._server = url
        self._url = url + ("/v1/completions" if api == "openai" else "/generate_stream")

    async def send(self, ask: Ask) -> Outcome:
        """Sends one request and reads its answer to the end; failures are in the outcome."""
        outcome = Outcome(ask.adapter, time.perf_counter())
        await self.fill(outcome, ask)
        return outcome

    async def fill(self, outcome: Outcome, ask: Ask) -> None:
        """As `send`, for who reads the outcome while it grows, or cancels and keeps what came."""
        try:
            read = self._read_openai if self._api == "openai" else self._read_lorax
            async with self._session.post(self._url, json=self._body(ask)) as response:
                if response.status != 200:
                    raise ServerError(f"{response.status}: {(await response.text())[:300]}")
                async for frame in _frames(response):
                    read(frame, outcome)
            if not outcome.arrivals:
                raise ServerError("the answer ended without a token")
        except (aiohttp.ClientError, TimeoutError, ServerError, ValueError) as error:
            outcome.error = what_failed(error, self._server)
        outcome.finished_at = time.perf_counter()

    def _body(self, ask: Ask) -> dict[str, Any]:
        is_base = ask.adapter == BASE
        if self._api == "openai":
            return {
                "model": self._model if is_base else ask.adapter,
                "prompt": ask.prompt,
                "max_tokens": ask.output_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"ignore_eos": True} if self._ignore_eos else {}),
            }
        parameters = {
            "max_new_tokens": ask.output_tokens,
            "ignore_eos_token": self._ignore_eos,
            "details": True,
            **({} if is_base else {"adapter_id": ask.adapter}),
        }
        return {"inputs": ask.prompt, "parameters": parameters}

    def _read_openai(self, frame: dict[str, Any], outcome: Outcome) -> None:
        for choice in frame.get("choices", ()):
            if choice.get("text") or choice.get("finish_reason") is None:
                outcome.arrivals.append(time.perf_counter())
                outcome.text += choice.get("text", "")
        if usage := frame.get("usage"):
            outcome.prompt_tokens = usage["prompt_tokens"]
            outcome.output_tokens = usage["completion_tokens"]

    def _read_lorax(self, frame: dict[str, Any], outcome: Outcome) -> None:
        outcome.arrivals.append(time.perf_counter())
        if details := frame.get("details"):
            outcome.prompt_tokens = details["prompt_tokens"]
            outcome.output_tokens = details["generated_tokens"]
        if frame.get("generated_text") is not None:
            outcome.text = frame["generated_text"]


async def _frames(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The data of server-sent events. Raises ServerError for one that carries an error."""
    rest = b""
    async for chunk in response.content.iter_any():
        *frames, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for frame in frames:
            if not frame.startswith(b"data:") or frame.endswith(b"[DONE]"):
                continue
            data: dict[str, Any] = json.loads(frame[5:])
            if "error" in data:
                raise ServerError(str(data["error"])[:300])
            yield data
