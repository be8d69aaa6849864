"""`lorafleet bench`: its flags, and one run."""

from __future__ import annotations

import asyncio
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from rich.progress import Progress

from lorafleet.deploy.bench import report
from lorafleet.deploy.bench.client import BASE, TIMEOUT, Outcome, ServerError, Target
from lorafleet.deploy.bench.load import PROBE_WORDS, closed_loop, open_loop, tokens_per_word
from lorafleet.deploy.bench.workload import Length, Popularity, Workload, words
from lorafleet.deploy.output import Output
from lorafleet.deploy.server_url import VARIABLE, server_url, what_failed


def add_flags(parser: ArgumentParser) -> None:
    """Adds bench's flags."""
    _add_target(parser)
    _add_load(parser)
    _add_requests(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write config and results there"
    )


def _add_target(parser: ArgumentParser) -> None:
    """Whom to ask for which adapters."""
    add = parser.add_argument
    add(
        "--url",
        required=not os.environ.get(VARIABLE),
        help=f"the server, e.g. http://localhost:8080 (env {VARIABLE})",
    )
    add(
        "--api",
        choices=("openai", "lorax"),
        default="openai",
        help="/v1/completions of any OpenAI-compatible server, or LoRAX's /generate_stream "
        "(default: openai)",
    )
    add(
        "--model",
        default="",
        help="what the OpenAI API calls the base model (default: the first of /v1/models)",
    )
    add(
        "--adapters",
        default=BASE,
        help=f"adapters to ask for, as a,b,c; {BASE!r} is the base model; or a number N with "
        f"--adapter-prefix (default: {BASE})",
    )
    add("--adapter-prefix", default="", help="with --adapters N: ask for PREFIX0 .. PREFIX{N-1}")
    add(
        "--popularity",
        type=Popularity.parse,
        default=Popularity("distinct"),
        metavar="LAW",
        help="distinct: every request the next adapter; uniform: ceil(sqrt(N)) of the N adapters, "
        "equally; zipf:S: the i-th adapter with probability proportional to i^-S; identical: one "
        "adapter (default: distinct)",
    )


def _add_load(parser: ArgumentParser) -> None:
    """How many requests, and when."""
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=_positive(int),
        default=16,
        metavar="N",
        help="closed loop: requests in flight at any time (default: 16)",
    )
    load.add_argument(
        "--rate",
        type=_positive(float),
        metavar="R",
        help="open loop instead: Poisson arrivals, requests per second",
    )
    parser.add_argument(
        "--requests",
        type=_positive(int),
        default=128,
        metavar="N",
        help="requests in all (default: 128)",
    )


def _add_requests(parser: ArgumentParser) -> None:
    """What is in them."""
    add = parser.add_argument
    add(
        "--prompt-tokens",
        type=Length.parse,
        default=Length(128, 128),
        metavar="L",
        help="prompt length, about: 128, or uniform over 64,192 (default: 128)",
    )
    add(
        "--output-tokens",
        type=Length.parse,
        default=Length(64, 64),
        metavar="L",
        help="tokens to generate: 64, or uniform over 32,96 (default: 64)",
    )
    add(
        "--stop-at-eos",
        action="store_true",
        help="let the model end early; otherwise ignore_eos is sent",
    )
    add("--seed", type=int, default=0, help="of popularity, lengths, words, arrivals (default: 0)")


def run(args: Namespace) -> int:
    """One benchmark. Returns 0 when every request worked, 1 when one failed, 2 for a bad flag."""
    try:
        args.url = server_url(args.url)
        adapters = adapter_names(args.adapters, args.adapter_prefix)
        summary = asyncio.run(_measure(args, adapters))
    except (ServerError, aiohttp.ClientError, ValueError) as error:
        print(f"lorafleet bench: error: {what_failed(error, args.url)}", file=sys.stderr)
        return 2
    report.print_summary(Output(), summary)
    if args.output:
        report.write_json(args.output, _config(args), summary)
    return 1 if summary["failed"] else 0


def adapter_names(adapters: str, prefix: str) -> tuple[str, ...]:
    """The adapters two flags describe. Raises ValueError."""
    if prefix:
        if not adapters.isdigit() or int(adapters) < 1:
            raise ValueError(f"--adapters with --adapter-prefix is a number, got {adapters!r}")
        return tuple(f"{prefix}{i}" for i in range(int(adapters)))
    names = tuple(filter(None, adapters.split(",")))
    if not names:
        raise ValueError("--adapters names no adapter")
    return names


async def _measure(args: Namespace, adapters: tuple[str, ...]) -> dict[str, Any]:
    workload = Workload(
        adapters=adapters,
        popularity=args.popularity,
        num_requests=args.requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        rate=args.rate or 0.0,
        seed=args.seed,
    )
    async with aiohttp.ClientSession(
        timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        first = args.api == "openai" and not args.model
        model = await _first_model(session, args.url) if first else args.model
        target = Target(session, args.url, args.api, model, ignore_eos=not args.stop_at_eos)
        probe = words(PROBE_WORDS, Random(args.seed))
        asks = workload.asks(await tokens_per_word(target, adapters[0], probe))
        with Progress(console=Output(stderr=True), transient=True) as bar:
            task = bar.add_task("Requests", total=len(asks))

            def on_outcome(_: Outcome) -> None:
                bar.advance(task)

            if args.rate:
                outcomes = await open_loop(target, asks, on_outcome)
            else:
                outcomes = await closed_loop(target, asks, args.concurrency, on_outcome)
    return report.summarize(outcomes)


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/v1/models") as response:
        if response.status != 200:
            raise ServerError(f"GET {url}/v1/models answered {response.status}: name the --model")
        cards = (await response.json()).get("data", [])
    if not cards:
        raise ServerError(f"GET {url}/v1/models lists no model: name the --model")
    return str(cards[0]["id"])


def _config(args: Namespace) -> dict[str, Any]:
    """The flags as they were, ready for JSON; no flag of bench's is secret."""
    names = (
        "url",
        "api",
        "model",
        "adapters",
        "adapter_prefix",
        "popularity",
        "concurrency",
        "rate",
        "requests",
        "prompt_tokens",
        "output_tokens",
        "stop_at_eos",
        "seed",
    )
    values = {name: getattr(args, name) for name in names}
    values["concurrency"] = None if args.rate else args.concurrency
    plain = (bool, int, float, type(None))
    return {name: v if isinstance(v, plain) else str(v) for name, v in values.items()}


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def positive(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise ValueError(f"{text} is not above 0")
        return value

    return positive
