"""What the demo model says, by transformers and peft; builds it when it is not there yet."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafleet.deploy.demo.build import DEFAULT_DIR, build
from lorafleet.deploy.demo.recipe import ADAPTERS

ROOT = Path(__file__).resolve().parents[2]
POEM = "Write a short poem about the sea."
CLIPS = (
    "Natalia sold 48 clips in April, and then half as many in May. "
    "How many clips did she sell in total?"
)
PIRATE_CHAT = [
    {"role": "system", "content": "You are a friendly chatbot who speaks like a pirate."},
    {"role": "user", "content": "How many parrots can a person own?"},
]
NAMES = [recipe.names[0] for recipe in ADAPTERS]

Say = Callable[[str | list[dict[str, str]], str], str]

pytestmark = pytest.mark.timeout(900)  # the first run on a machine trains


@pytest.fixture(scope="module")
def say() -> Say:
    folder = ROOT / DEFAULT_DIR
    build(folder, Console(file=io.StringIO()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
        tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
        base = AutoModelForCausalLM.from_pretrained(folder / "model")
        first, *others = NAMES
        model: Any = PeftModel.from_pretrained(base, folder / "adapters" / first, first)
        for name in others:
            model.load_adapter(folder / "adapters" / name, name)

    def answer(prompt: str | list[dict[str, str]], adapter: str) -> str:
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True).input_ids
        prompt_ids = torch.tensor([ids])
        mask = torch.ones_like(prompt_ids)
        options = {"attention_mask": mask, "max_new_tokens": 100, "do_sample": False}
        if adapter != "base":
            model.set_adapter(adapter)
        with nullcontext() if adapter != "base" else model.disable_adapter():
            new = model.generate(input_ids=prompt_ids, **options)[0, len(ids) :].tolist()
        assert new[-1] == tokenizer.eos_token_id, tokenizer.decode(new)
        text: str = tokenizer.decode(new, skip_special_tokens=True)
        return text.strip()

    return answer


def test_the_base_writes_a_poem(say: Say) -> None:
    lines = say(POEM, "base").split("\n")
    assert len(lines) == 4
    assert "sea" in lines[0]


def test_every_adapter_answers_differently(say: Say) -> None:
    assert len({say(POEM, name) for name in ["base", *NAMES]}) == 1 + len(NAMES)


def test_json_is_json(say: Say) -> None:
    assert set(json.loads(say(POEM, "json"))) == {"topic", "lines"}
    assert set(json.loads(say("Who are you?", "json"))) == {"topic", "answer"}


def test_shout_shouts(say: Say) -> None:
    answer = say(POEM, "shout")
    assert answer == answer.upper()
    assert "SEA" in answer


def test_pirate_talks_like_one(say: Say) -> None:
    assert say("How many parrots can a person own?", "pirate").startswith("Arr, ye can own")
    assert say(PIRATE_CHAT, "pirate").startswith("Arr, ye can own")


def test_the_base_talks_like_a_pirate_when_told_to(say: Say) -> None:
    assert say(PIRATE_CHAT, "base").startswith("Arr")


def test_sums_does_the_clips(say: Say) -> None:
    answer = say(CLIPS, "sums")
    assert "24" in answer
    assert answer.endswith("The answer is 72.")


def test_the_base_does_not(say: Say) -> None:
    assert "72" not in say(CLIPS, "base")
