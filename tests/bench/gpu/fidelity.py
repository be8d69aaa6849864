"""Whether a large model in bf16 is what float32 makes of the same weights, adapters included.

The engine draws tokens greedily in a full batch and alone. transformers reads prompt and tokens in
float32, with the adapter's B A added to the weights: how far are the engine's log-probabilities of
its own tokens from those? Rounding alone is what transformers' own bf16 is away from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.bench.gpu.device import DEVICE, give_back_memory
from tests.bench.gpu.engine import Engine
from tests.bench.gpu.reports import Row
from tests.bench.gpu.shapes import Shape

RANK, SLOTS = 16, 8
PROMPT, STEPS = 400, 48


def fidelity(shape: Shape, batch: int = 64) -> list[Row]:
    """Nats between the engine's log-probabilities and float32's, root mean square and most."""
    engine = Engine.build(shape, batch, PROMPT + STEPS + 2, SLOTS, SLOTS * shape.packed_bytes(RANK))
    engine.load_adapters([RANK] * SLOTS)
    mixed = [row % (SLOTS + 1) for row in range(batch)]
    cases: list[tuple[str, int, list[int]]] = [
        (f"base, B={batch}", 0, mixed), (f"r{RANK}, B={batch}", 1, mixed),
        ("base, B=1", 0, [0]), (f"r{RANK}, B=1", 0, [1]),
    ]  # fmt: skip
    drawn = [(what, slots[row], *_draw(engine, slots, row)) for what, row, slots in cases]
    rows: list[Row] = []
    for slot in (0, 1):
        exact = _reference(engine, slot, torch.float32)
        if slot == 0:
            ids = drawn[0][2]
            rounded = _logprobs(_reference(engine, 0, torch.bfloat16), ids)
            rows.append({"what": "transformers in bf16", **_far(rounded, _logprobs(exact, ids))})
        for what, of, ids, logprobs in drawn:
            if of == slot:
                far = _far(logprobs, _logprobs(exact, ids))
                rows.append({"what": what, **far, "over_bf16": far["rms"] / rows[0]["rms"]})
        del exact
        give_back_memory()
    for row in rows:
        print(f"{shape.name} {row}", flush=True)
    return rows


def _draw(engine: Engine, slots: Sequence[int], row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's prompt and tokens, and the log-probabilities of those after the first."""
    engine.prefill(slots, PROMPT)
    logprobs = []
    for position in range(PROMPT, PROMPT + STEPS):
        launched = engine.launch(engine.decode_plan(slots, position))
        logprobs.append(engine.worker.finish(launched).logprobs[row])
    return engine.rows.tokens[row, : PROMPT + STEPS + 1].clone(), torch.tensor(logprobs)


@torch.inference_mode()
def _reference(engine: Engine, slot: int, dtype: torch.dtype) -> Any:
    """transformers' model with the engine's weights, and those of the slot's adapter added."""
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(engine.shape.config(), dtype=dtype)
    for weight in engine.decoder._weights():
        counts = [sum(stop - start for start, stop in runs) for runs in weight.rows]
        for name, part in zip(weight.names, _dense(weight.parameter).split(counts), strict=True):
            model.get_parameter(name).copy_(part)
    for index, site in enumerate(engine.decoder.sites):
        alone = engine.tier.site(index).alone(slot)
        if alone.a is None or alone.b is None:
            continue
        added = (_dense(alone.b).float() @ _dense(alone.a).float()).split(site.widths)
        for target, update in zip(site.layout.targets, added, strict=True):
            weight = model.get_submodule(target.name).weight
            weight.copy_(weight.float() + update)
    return model.eval()


def _dense(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight


@torch.inference_mode()
def _logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the tokens that the engine drew while decoding."""
    logits = model(ids[None, :-1], logits_to_keep=STEPS).logits[0].float()
    logprobs: torch.Tensor = logits.log_softmax(-1).gather(1, ids[-STEPS:, None])
    return logprobs.squeeze(1).cpu()


def _far(found: torch.Tensor, expected: torch.Tensor) -> Row:
    error = found - expected
    return {"rms": float(error.square().mean().sqrt()), "most": float(error.abs().max())}
