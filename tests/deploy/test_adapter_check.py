"""`lorafleet adapters check` says what a server would say, whatever form an adapter has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafleet.deploy.adapters.check import check_folders
from lorafleet.deploy.adapters.verdict import Verdict
from tests.cache.adapter_cases import pickle_weights, split_weights
from tests.checkpoints import SCALING_RECIPES, make_adapters, make_checkpoint

DORA = SCALING_RECIPES[:1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def dora(model: Path, tmp_path: Path) -> Path:
    make_adapters(model, tmp_path, DORA)
    return tmp_path / DORA[0].name


def check(model: Path, folder: Path, allow_pickles: bool = False) -> Verdict:
    (verdict,) = check_folders([str(folder)], str(model), "", 2, "float32", allow_pickles)
    return verdict


def test_dora_with_the_bases_weights_and_without(model: Path, dora: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    for base in (model, bare):
        verdict = check(base, dora)
        assert (verdict.reason, verdict.rank, verdict.num_modules) == ("", 4, 14)


def test_sharded_weights(model: Path, dora: Path) -> None:
    assert check(model, split_weights(dora)).is_served
    next(dora.glob("adapter_model-00002*")).unlink()
    assert "adapter_model-00002-of-00002.safetensors" in check(model, dora).reason


def test_pickled_weights_as_a_server_with_or_without_the_flag(model: Path, dora: Path) -> None:
    pickle_weights(dora)
    assert "--allow-pickled-adapters" in check(model, dora).reason
    assert check(model, dora, allow_pickles=True).is_served


def test_what_config_and_tensors_disagree_on(model: Path, dora: Path) -> None:
    path = dora / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_dora": False}))
    assert "use_dora is false" in check(model, dora).reason
    path.write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    assert "target_modules leaves out" in check(model, dora).reason
