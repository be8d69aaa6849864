"""The demo run: the same prompts to the base model and every adapter at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorafleet.deploy.bench.client import BASE, TIMEOUT, Outcome, Target
from lorafleet.deploy.bench.workload import Ask
from lorafleet.deploy.demo.recipe import ADAPTERS

PROMPTS = (
    "Write a short poem about the sea.",
    "Natalia sold 48 clips in April, and then half as many in May. "
    "How many clips did she sell in total?",
    "How many parrots can a person own?",
)
MAX_NEW_TOKENS = 96
STEP_ADAPTERS = "lorafleet_step_adapters_max"


@dataclass(frozen=True, slots=True)
class Results:
    """What the demo saw."""

    asks: list[Ask]
    outcomes: list[Outcome]  # one per ask
    step_adapters: int  # most adapters in one step
    cards: list[dict[str, Any]]  # of /v1/models, adapters only

    def problems(self) -> list[str]:
        """What did not work; empty when the demo succeeded."""
        failed = [f"{o.adapter}: {o.error}" for o in self.outcomes if o.error]
        if self.step_adapters < len(ADAPTERS):
            failed.append(f"at most {self.step_adapters} adapters shared a step")
        listed = {card["id"] for card in self.cards}
        missing = {adapter.names[0] for adapter in ADAPTERS} - listed
        failed += [f"/v1/models does not list {name}" for name in sorted(missing)]
        return failed


def asks() -> list[Ask]:
    """Every prompt for the base model and for each adapter."""
    names = [BASE, *(adapter.names[0] for adapter in ADAPTERS)]
    return [Ask(name, prompt, MAX_NEW_TOKENS) for prompt in PROMPTS for name in names]


async def measure(url: str) -> Results:
    """Sends all the asks at the same time and reads what the service tells of itself."""
    async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
        target = Target(session, url, "lorax", model="", ignore_eos=False)
        sent = asks()
        outcomes = await asyncio.gather(*map(target.send, sent))
        async with session.get(f"{url}/metrics") as response:
            step_adapters = read_gauge(await response.text(), STEP_ADAPTERS)
        async with session.get(f"{url}/v1/models") as response:
            cards = (await response.json())["data"]
    adapters = [card for card in cards if card.get("parent")]
    return Results(sent, outcomes, int(step_adapters), adapters)


def read_gauge(exposition: str, name: str) -> float:
    """The value of a gauge without labels in Prometheus's text; 0 when it is not there."""
    for line in exposition.splitlines():
        if line.startswith(f"{name} "):
            return float(line.removeprefix(name))
    return 0.0


def show(console: Console, results: Results) -> None:
    """The table of completions, then the step and the tiers."""
    console.print(_completions(results.asks, results.outcomes))
    console.print(
        f"{results.step_adapters} different adapters shared one step, "
        f"beside rows of the base model alone."
    )
    console.print(_tiers(results.cards))


def _completions(asks: Sequence[Ask], outcomes: Sequence[Outcome]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, expand=True)
    table.add_column("adapter", min_width=7)
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=4)
    for column in ("tokens", "TTFT, ms", "tokens/s"):
        table.add_column(column, justify="right", min_width=len(column))
    for ask, outcome in zip(asks, outcomes, strict=True):
        last_of_prompt = ask.adapter == ADAPTERS[-1].names[0]
        table.add_row(*_completion(ask, outcome), end_section=last_of_prompt)
    return table


def _completion(ask: Ask, outcome: Outcome) -> tuple[str | Text, ...]:
    """A row; `Text` keeps rich from reading square brackets as markup."""
    return (
        ask.adapter,
        Text(str(ask.prompt)),
        Text(outcome.error or outcome.text.strip(), style="red" if outcome.error else ""),
        str(outcome.output_tokens),
        f"{1e3 * outcome.first_token_seconds:.0f}" if outcome.arrivals else "-",
        f"{outcome.output_tokens / outcome.total_seconds:.0f}",
    )


def _tiers(cards: Sequence[dict[str, Any]]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for column in ("adapter", "tier"):
        table.add_column(column)
    table.add_column("rank", justify="right")
    for card in cards:
        table.add_row(card["id"], str(card.get("tier", "?")), str(card.get("rank", "?")))
    return table
