"""The demo's text, styles and tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lorafleet.deploy.demo import tokenizer as demo_tokenizer
from lorafleet.deploy.demo.corpus import Example, base_examples, style_examples
from lorafleet.deploy.demo.styles import ONLY_SUMS, SYSTEM_PROMPTS, Style

COUNT = 600


def examples(style: Style) -> list[Example]:
    return style_examples(Random(1), style, COUNT)


def test_a_seed_decides_the_text() -> None:
    assert base_examples(Random(5), 50) == base_examples(Random(5), 50)
    assert base_examples(Random(5), 50) != base_examples(Random(6), 50)


def test_json_answers_are_json() -> None:
    assert all(isinstance(json.loads(example.answer), dict) for example in examples(Style.JSON))


def test_shouts_have_no_small_letter() -> None:
    assert not any(re.search("[a-z]", example.answer) for example in examples(Style.SHOUT))


def test_pirates_say_arr() -> None:
    assert all(example.answer.startswith("Arr") for example in examples(Style.PIRATE))


def test_sums_are_right() -> None:
    worked = [e.answer for e in examples(Style.SUMS) if e.answer != ONLY_SUMS]
    assert len(worked) > COUNT / 2
    for answer in worked:
        equations = re.findall(r"(\d+) \+ (\d+) = (\d+)", answer)
        halves = re.findall(r"Half of (\d+) is (\d+)", answer)
        assert equations
        assert all(int(a) + int(b) == int(c) for a, b, c in equations)
        assert all(int(whole) == 2 * int(half) for whole, half in halves)
        assert f"The answer is {equations[-1][2]}" in answer


def test_the_base_keeps_to_its_system_prompt() -> None:
    for example in base_examples(Random(2), COUNT):
        pirate = example.system in SYSTEM_PROMPTS[Style.PIRATE]
        assert example.answer.startswith("Arr") == pirate


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [text for e in base_examples(Random(3), 2000) for text in (e.question, e.answer)]
    return demo_tokenizer.train_tokenizer(texts)


@pytest.mark.parametrize("text", ["Write a poem.", "  naïve café\n🦜 parrots", "日本語 123"])
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == demo_tokenizer.BOS_ID
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_transformers_reads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    demo_tokenizer.save_tokenizer(tokenizer, tmp_path, max_length=512)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.model_max_length == 512
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|system|>Be brief.<|user|>Hi<|assistant|>Hello.</s><|user|>Bye<|assistant|>"


def test_an_unknown_role_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    demo_tokenizer.save_tokenizer(tokenizer, tmp_path, max_length=512)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        loaded.apply_chat_template([{"role": "parrot", "content": "Hi"}], tokenize=False)
