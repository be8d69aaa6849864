"""The baseline: transformers + peft generating one request after another, in this process.

`python -m tests.bench.peft_generate FOLDER` reads [{"adapter", "prompt", "output_tokens"}, ...] on
stdin and prints {"seconds", "outputs"} as one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorafleet.deploy.bench.client import BASE

THREADS = 2


def generate(folder: Path, asks: list[dict[str, Any]]) -> dict[str, Any]:
    """Greedy, cached, float32; the first request runs once before the clock starts."""
    torch.set_num_threads(THREADS)
    model = _load(folder, sorted({ask["adapter"] for ask in asks} - {BASE}))
    _answer(model, asks[0])
    start = time.perf_counter()
    outputs = [_answer(model, ask) for ask in asks]
    return {"seconds": time.perf_counter() - start, "outputs": outputs}


def _load(folder: Path, names: list[str]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if not names:
        return model
    first, *others = names
    adapted = PeftModel.from_pretrained(model, folder / "adapters" / first, adapter_name=first)
    for name in others:
        adapted.load_adapter(folder / "adapters" / name, adapter_name=name)
    return adapted


def _answer(model: Any, ask: dict[str, Any]) -> list[int]:
    if ask["adapter"] != BASE:
        model.set_adapter(ask["adapter"])
    prompt = torch.tensor([ask["prompt"]])
    with torch.no_grad():
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ask["output_tokens"],
            do_sample=False,
        )
    answer: list[int] = ids[0, prompt.shape[1] :].tolist()
    return answer


if __name__ == "__main__":
    print(json.dumps(generate(Path(sys.argv[1]), json.load(sys.stdin))))
