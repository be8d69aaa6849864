"""The benchmarks of docs/benchmarks.md: `python -m tests.bench NAME ...`.

peft: a random 34 M Llama, 8 adapters, one shard, against transformers + peft. demo: the same with
the demo model and two shards. router: the router over a fake shard. stall: streams while adapters
arrive. tiers: first tokens by where the adapter is. starvation: a lone request beside 500 for
another adapter. arena: the device arena under churn. profile: where the router's time goes.
Each prints one JSON line.
"""

from __future__ import annotations

import json
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lorafleet.deploy.bench.report import commit
from lorafleet.deploy.demo.build import DEFAULT_DIR, build
from lorafleet.deploy.demo.recipe import ADAPTERS
from tests.bench import arena_churn, first_token, no_stall, random_llama, router_alone, starvation
from tests.bench.versus_peft import Case, compare


def main() -> None:
    """Runs the benchmarks that are named, the first three without names."""
    parser = ArgumentParser("python -m tests.bench", description=__doc__)
    known = (*_BENCHES, "profile")
    parser.add_argument("names", nargs="*", choices=[*known, []], default=list(known[:3]))
    for name in parser.parse_args().names:
        if name == "profile":
            print(router_alone.profile())
        else:
            print(json.dumps(_BENCHES[name]() | {"commit": commit()}))


def _peft() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        random_llama.write(Path(folder))
        names = tuple(f"a{i}" for i in range(random_llama.NUM_ADAPTERS))
        return compare(Case("random 34M Llama", Path(folder), names, num_shard=1))


def _demo() -> dict[str, object]:
    build(DEFAULT_DIR, Console(stderr=True))
    names = tuple(recipe.names[0] for recipe in ADAPTERS)
    return compare(Case("demo model", DEFAULT_DIR, names, num_shard=2))


def _starvation() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        return starvation.measure(Path(folder))


_BENCHES: dict[str, Callable[[], dict[str, object]]] = {
    "peft": _peft,
    "demo": _demo,
    "router": router_alone.measure,
    "stall": no_stall.measure,
    "tiers": first_token.measure,
    "starvation": _starvation,
    "arena": arena_churn.measure,
}

if __name__ == "__main__":
    main()
