"""Others on the same card: transformers + peft, and any OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lorafleet.deploy.bench.client import BASE
from tests.bench.gpu.device import DEVICE, synchronize
from tests.bench.gpu.reports import Row, find_row, read_reports
from tests.bench.gpu.shapes import ALL_LINEAR, Shape
from tests.bench.gpu.step import CONTEXT
from tests.bench.gpu.streams import Load, describe, line, send

RANK = 16
_NEW_TOKENS = 8
_REPEATS = 3
_ADAPTERS_OF_A_SERVER = 32


def peft_steps(
    shape: Shape, out: Path, batches: tuple[int, ...] = (8, 32), context: int = CONTEXT
) -> list[Row]:
    """peft's `generate` with an adapter of its own for every row, and the base model alone.

    The weights are of the same shape and law as the engine's. A step is what one more new token
    takes, the median of three; `times_ours` is over the engine's step in `out`, where it is.
    """
    if importlib.util.find_spec("peft") is None:
        print("peers: peft is skipped, it is not installed", flush=True)
        return []
    names = [f"a{i}" for i in range(max(batches))]
    model = _adapted(shape, names)
    rows: list[Row] = []
    for batch in batches:
        for what, adapters in (("base", ["__base__"] * batch), ("distinct r16", names[:batch])):
            row: Row = {"what": f"peft, {what}", "batch": batch}
            row["step_ms"] = _step_ms(model, shape, adapters, context)
            ours = find_row(read_reports(out), "decode", shape.name, what=what, batch=batch)
            if ours is not None:
                row["times_ours"] = row["step_ms"] / ours["step_ms"]
            rows.append(row)
            beside = f"  x{row['times_ours']:.1f} of ours" if ours else ""
            print(
                f"{shape.name} peft {what:12} B={batch:3} step {row['step_ms']:7.2f} ms{beside}",
                flush=True,
            )
    return rows


def _adapted(shape: Shape, names: Sequence[str]) -> Any:
    """A random model with random adapters, on the device in bfloat16."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        # init_lora_weights=False leaves B random.
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=list(ALL_LINEAR),
            init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        adapted = get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            adapted.add_adapter(name, config)
    return adapted.to(torch.bfloat16).eval()


def _step_ms(model: Any, shape: Shape, adapters: Sequence[str], context: int) -> float:
    prompts = torch.randint(0, shape.vocab_size, (len(adapters), context), device=DEVICE)

    def seconds(new_tokens: int) -> float:
        synchronize()
        started = time.perf_counter()
        model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, adapter_names=list(adapters),
        )  # fmt: skip
        synchronize()
        return time.perf_counter() - started

    with torch.inference_mode():
        seconds(1)
        steps = [(seconds(1 + _NEW_TOKENS) - seconds(1)) / _NEW_TOKENS for _ in range(_REPEATS)]
    return 1e3 * statistics.median(steps)


def other_server(shape: Shape, url: str, load: Load) -> list[Row]:
    """The load of the `http` part on another server: its base model, and its adapters if any.

    The first of /v1/models is the base model; those that name a parent are adapters.
    """
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        cards = json.load(response)["data"]
    base = cards[0]["id"]
    # Ours calls a local adapter by its root; others call it by its id.
    adapters = [
        card["root"] if card.get("owned_by") == "lorafleet" else card["id"]
        for card in cards[1:]
        if card.get("parent")
    ][:_ADAPTERS_OF_A_SERVER]
    rows: list[Row] = []
    cases = [("base", [BASE])]
    if adapters:
        cases += [("one shared", adapters[:1]), (f"{len(adapters)} adapters", adapters)]
    for what, names in cases:
        warm_up = Load(load.streams, 1, load.prompt_tokens, 8)
        send(url, base, warm_up.asks(names, shape.vocab_size, seed=1000), load.streams)
        asks = load.asks(names, shape.vocab_size, seed=1 + len(rows))
        row = describe(f"server, {what}", load, send(url, base, asks, load.streams))
        rows.append(row | {"url": url, "model": base})
        print(line(url, row), flush=True)
    return rows
