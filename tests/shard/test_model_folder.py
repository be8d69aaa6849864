"""A model's folder that is of no use is told in one line that names --model-id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.shard.errors import BadCheckpoint, UnsupportedModel
from lorafleet.shard.model_config import model_config
from lorafleet.shard.model_folder import check_model, check_path

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def refusals(folder: Path) -> list[str]:
    """What the launcher says of a folder, and what a shard does."""
    with pytest.raises(BadCheckpoint) as launchers:
        check_model(str(folder), 1)
    with pytest.raises(BadCheckpoint) as shards:
        model_config(str(folder), folder)
    return [str(launchers.value), str(shards.value)]


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert refusals(tmp_path) == [f"--model-id {tmp_path} has no config.json"] * 2


@pytest.mark.parametrize("text", [b"{", b"\xff", b""])
def test_a_config_that_is_not_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    for said in refusals(tmp_path):
        assert said.startswith(f"--model-id {tmp_path}: config.json is not JSON: ")


@pytest.mark.parametrize("config", [[], {}, {"model_type": 3}])
def test_a_config_of_no_model(tmp_path: Path, config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusals(tmp_path) == [f"--model-id {tmp_path}: config.json has no model_type"] * 2


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "abacus"}, "model type `abacus`"),
        ({"model_type": "llama", "hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"model_type": "llama", "num_attention_heads": 0}, "division"),
    ],
)
def test_a_config_that_transformers_cannot_use(
    tmp_path: Path, config: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_model(str(tmp_path), 1)
    with pytest.raises(BadCheckpoint, match=complaint) as caught:
        model_config(str(tmp_path), tmp_path)
    assert str(caught.value).startswith(f"--model-id {tmp_path}: config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "/nowhere", "~/nowhere", __file__])
def test_a_path_is_no_hub_id(path: str) -> None:
    with pytest.raises(BadCheckpoint, match=f"^--model-id {path} is not a directory$"):
        check_path(path)


@pytest.mark.parametrize("model_id", [".", "/", "owner/name", "gpt2"])
def test_a_folder_or_a_hub_id_may_be_one(model_id: str) -> None:
    check_path(model_id)


def test_a_hubs_model_is_left_to_the_shards() -> None:
    check_model("owner/name@main", 3)


def test_what_the_shards_cannot_share(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | HEADS))
    for num_shard in (1, 2, 4):
        check_model(str(tmp_path), num_shard)
    with pytest.raises(UnsupportedModel, match="num_attention_heads 4 is not divisible by --num-"):
        check_model(str(tmp_path), 3)


def test_what_a_config_leaves_out_is_left_to_the_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_key_value_heads": null}')
    check_model(str(tmp_path), 3)
