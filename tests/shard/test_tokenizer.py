"""The tokenizer files a shard hands to the router."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lorafleet.shard.tokenizer import eos_token_ids, tokenizer_config_json, tokenizer_json
from tests import fake_tokenizer


def test_the_file_is_passed_on_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(fake_tokenizer.tokenizer_json())
    assert tokenizer_json(tmp_path) == fake_tokenizer.tokenizer_json()


def test_an_older_tokenizer_is_converted(tmp_path: Path) -> None:
    """A GPT-2 style folder: vocab.json and merges.txt, no tokenizer.json."""
    letters = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "he", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 512})
    )
    made = Tokenizer.from_str(tokenizer_json(tmp_path).decode())
    assert made.encode("he said").tokens == ["he", "Ġ", "s", "a", "i", "d"]


def test_the_chat_template_file_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(fake_tokenizer.tokenizer_json())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>"
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()  # where transformers 5 writes it
    config = json.loads(tokenizer_config_json(tmp_path))
    assert config["chat_template"] == "{{ messages }}"
    assert config["eos_token"] == "</s>"


def test_no_config_is_an_empty_one(tmp_path: Path) -> None:
    assert json.loads(tokenizer_config_json(tmp_path)) == {}


def test_eos_of_the_generation_config_wins(tmp_path: Path) -> None:
    config = SimpleNamespace(eos_token_id=2)
    assert eos_token_ids(tmp_path, config) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert eos_token_ids(tmp_path, config) == [7, 8]
    assert eos_token_ids(tmp_path / "none", SimpleNamespace(eos_token_id=None)) == []
