"""Merged adapters: peft's numbers to the bit, one copy on disk, and sentences for the rest."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.disk_tier import DiskTier
from lorafleet.cache.errors import (
    AdapterFault,
    AdapterNotFound,
    AdapterUnservable,
    SourceUnavailable,
    TierFull,
)
from lorafleet.cache.merging.recipe import MajoritySign, Member, MergeRecipe, Strategy
from lorafleet.cache.sources.hub import HubSource
from lorafleet.cache.sources.local import LocalSource
from lorafleet.cache.sources.merged import MergedSource
from lorafleet.proto.messages import AdapterKey, FetchProgress
from tests.cache.adapter_cases import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    config_of,
    tensors_of,
    tiny_layout,
    write_adapter,
)
from tests.cache.hub_stand_in import Hub, Repo
from tests.peft_merges import add_merge

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 8, "target_modules": ATTENTION},
    "other": {"lora_alpha": 8, "target_modules": ATTENTION},
    "strong": {"lora_alpha": 48, "target_modules": ATTENTION},
    "mlp": {"lora_alpha": 12, "target_modules": ["q_proj", "gate_proj", "down_proj"]},
    "rslora": {"lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True},
    "pattern": {"target_modules": ATTENTION, "rank_pattern": {"o_proj": 3}},
    "alphas": {
        "target_modules": ATTENTION,
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"o_proj": 5, "layers.1.self_attn.q_proj": 2},
    },
    "layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "other-layer": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "sixteen": {"target_modules": ATTENTION},
    "wide": {"target_modules": ATTENTION, "r": 6},
    "regex": {"target_modules": r".*\.(up|down)_proj"},
    "other-regex": {"target_modules": r".*\.1\..*\.(up|gate)_proj"},
}


@dataclass(frozen=True)
class Case:
    """Adapters by name, in a folder, and peft's model of them all."""

    root: Path
    peft: PeftModel


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=LAYERS,
    )
    base = LlamaForCausalLM(config)
    for name, options in ADAPTERS.items():
        model = get_peft_model(base, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | options))
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if ".lora_" in n):
                parameter.normal_()
        model.save_pretrained(root / name)
        model.unload()
    weights = root / "sixteen" / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights)
    names = list(ADAPTERS)
    model = PeftModel.from_pretrained(base, root / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(root / name, name)
    return Case(root, model)


@pytest.fixture
def source(case: Case, tmp_path: Path) -> MergedSource:
    return open_source(case.root, tmp_path)


def open_source(root: Path, cache: Path, rank: int = 0, world: int = 1) -> MergedSource:
    disk = DiskTier(cache / "disk", 1 << 26)
    return MergedSource(disk, {"local": LocalSource(str(root))}, tiny_layout(rank, world), False)


def recipe_of(
    weights: dict[str, float],
    strategy: Strategy = Strategy.LINEAR,
    density: float = 1.0,
    sign: MajoritySign = MajoritySign.TOTAL,
) -> MergeRecipe:
    members = (Member(AdapterKey("local", name), float(weight)) for name, weight in weights.items())
    return MergeRecipe(tuple(members), strategy, density, sign)


def fetch(source: MergedSource, recipe: MergeRecipe) -> Path:
    return source.fetch(recipe.key, "", lambda _: None)


def merged_by_peft(
    model: PeftModel, recipe: MergeRecipe
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """A recipe's merge as peft makes it: module name -> (A, B, scale)."""
    add_merge(model, recipe, "merge")
    found = {
        name.removeprefix("base_model.model."): (
            module.lora_A["merge"].weight.detach().clone(),
            module.lora_B["merge"].weight.detach().clone(),
            module.scaling["merge"],
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "merge" in module.lora_A
    }
    model.delete_adapter("merge")
    return found


HALVES = {"plain": 0.5, "other": 0.5}
THREE = {"plain": 0.7, "strong": -0.4, "other": 1.5}


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of(HALVES),
        recipe_of(THREE),
        recipe_of({"plain": 1, "mlp": 0.3}),
        recipe_of({"plain": 1, "sixteen": -2}),
        recipe_of({"pattern": 0.4, "alphas": 0.6}),
        recipe_of({"layer": 0.4, "other-layer": 0.6}),
        recipe_of({"regex": 0.4, "other-regex": 0.6}),
        recipe_of({"plain": 0.4, "rslora": 0.6}),
        recipe_of({"rslora": 0.4, "plain": 0.6}),
        recipe_of({"rslora": 0.4, "mlp": 0.0}),
        recipe_of(HALVES, Strategy.TIES, 0.3),
        recipe_of(THREE, Strategy.TIES, 0.5),
        recipe_of(THREE, Strategy.TIES, 0.5, MajoritySign.FREQUENCY),
        recipe_of(THREE, Strategy.TIES, 1.0, MajoritySign.FREQUENCY),
        recipe_of(THREE, Strategy.TIES, 1e-9),
        recipe_of({"alphas": 0.4, "pattern": 0.6}, Strategy.TIES, 0.2),
        recipe_of({"mlp": 1, "plain": 0.3, "sixteen": 1}, Strategy.TIES, 0.7),
        recipe_of(HALVES, Strategy.DARE_LINEAR, 0.3),
        recipe_of({"mlp": 1, "plain": -0.3}, Strategy.DARE_LINEAR, 0.8),
        recipe_of(THREE, Strategy.DARE_TIES, 0.3),
        recipe_of(THREE, Strategy.DARE_TIES, 0.6, MajoritySign.FREQUENCY),
        recipe_of({"alphas": 0.4, "pattern": 0.6}, Strategy.DARE_TIES, 0.5),
    ],
    ids=str,
)
def test_a_merge_is_pefts_to_the_bit(case: Case, source: MergedSource, recipe: MergeRecipe) -> None:
    wanted = merged_by_peft(case.peft, recipe)
    directory = fetch(source, recipe)
    spec = read_spec(directory, tiny_layout())
    tensors = load_file(directory / "adapter_model.safetensors")
    assert spec.modules.keys() == wanted.keys()
    for name, module in spec.modules.items():
        a, b, scale = wanted[name]
        assert torch.equal(tensors[module.a.name], a), name
        assert torch.equal(tensors[module.b.name], b), name
        assert module.scale == pytest.approx(scale, rel=1e-12)


def test_every_rank_reads_the_same_files(case: Case, tmp_path: Path) -> None:
    recipe = recipe_of(THREE, Strategy.DARE_TIES, 0.5)
    stages: list[FetchProgress] = []
    first, second = (open_source(case.root, tmp_path, rank, 2) for rank in range(2))
    directory = first.fetch(recipe.key, "", stages.append)
    made = (directory / "adapter_model.safetensors").stat().st_ino
    assert {stage.stage for stage in stages} == {"merging"}
    assert stages[-1].done_bytes == stages[-1].total_bytes == first.disk_bytes(recipe.key)
    stages.clear()
    assert second.fetch(recipe.key, "", stages.append) == directory
    assert (directory / "adapter_model.safetensors").stat().st_ino == made
    assert not stages
    elsewhere = open_source(case.root, tmp_path / "elsewhere").fetch(recipe.key, "", stages.append)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (elsewhere / name).read_bytes() == (directory / name).read_bytes()


def test_a_merge_computes_on_one_core(source: MergedSource) -> None:
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        source.fetch(recipe_of(HALVES).key, "", lambda _: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_member_that_changed_is_merged_again(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(tmp_path / name, tensors=tensors_of(seed=seed))
    source, recipe = open_source(tmp_path, tmp_path), recipe_of({"a": 1.0, "b": 1.0})
    before = load_file(fetch(source, recipe) / "adapter_model.safetensors")
    write_adapter(tmp_path / "b", tensors=tensors_of(seed=3))
    after = load_file(fetch(source, recipe) / "adapter_model.safetensors")
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert source.list() == [(recipe.key, fetch(source, recipe))]
    source.drop(recipe.key)
    assert source.list() == []


@pytest.mark.parametrize(
    ("members", "kind", "words"),
    [
        ({"plain": 1.0, "wide": 1.0}, AdapterUnservable, "'plain' has rank 4, 'wide' has 6"),
        (
            {"plain": 1.0, "pattern": 1.0},
            AdapterUnservable,
            "on model.layers.0.self_attn.o_proj, 'plain' has rank 4, 'pattern' has 3",
        ),
        ({"plain": 1.0, "layer": 1.0}, AdapterUnservable, "different layers_to_transform"),
        ({"plain": 1.0, "nobody": 1.0}, AdapterNotFound, "no local adapter 'nobody'"),
    ],
)
def test_what_cannot_be_merged_is_said(
    source: MergedSource, members: dict[str, float], kind: type[AdapterFault], words: str
) -> None:
    with pytest.raises(kind, match=words):
        fetch(source, recipe_of(members))
    assert source.list() == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "'odd' cannot be merged: use_dora is set"),
        ({"bias": "all"}, "'odd' cannot be merged: bias is set"),
        ({"modules_to_save": ["lm_head"]}, "'odd' cannot be merged: modules_to_save is set"),
        ({"peft_type": "IA3"}, "'odd' cannot be merged: peft_type is 'IA3'"),
    ],
)
def test_only_plain_lora_is_merged(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    write_adapter(tmp_path / "even")
    write_adapter(tmp_path / "odd", config_of(**fields))
    with pytest.raises(AdapterUnservable, match=words):
        fetch(open_source(tmp_path, tmp_path), recipe_of({"even": 1.0, "odd": 1.0}))


def test_members_speak_the_base_models_tokens(tmp_path: Path) -> None:
    base = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}
    other = base | {"model": {"type": "BPE", "vocab": {"a": 1, "b": 0}}}
    disk, sources = DiskTier(tmp_path / "disk", 1 << 26), {"local": LocalSource(str(tmp_path))}
    source = MergedSource(disk, sources, tiny_layout(), False, json.dumps(base).encode())
    recipe = recipe_of({"even": 1.0, "odd": 1.0})
    write_adapter(tmp_path / "even")
    shipped = write_adapter(tmp_path / "odd") / "tokenizer.json"
    shipped.write_text(json.dumps(other))
    with pytest.raises(AdapterUnservable, match=r"'odd' cannot be merged: its tokenizer\.json"):
        fetch(source, recipe)
    shipped.write_text("[]")
    with pytest.raises(AdapterUnservable, match=r"'odd' cannot be merged: tokenizer\.json is not"):
        fetch(source, recipe)
    assert source.list() == []
    shipped.write_text(json.dumps(base | {"padding": None}, indent=1))  # as a trainer saves it
    fetch(source, recipe)
    shipped.write_text(json.dumps(other))  # and not only before the merge is made
    with pytest.raises(AdapterUnservable, match=r"its tokenizer\.json"):
        fetch(source, recipe)


def test_a_member_without_a_config_says_so(tmp_path: Path) -> None:
    write_adapter(tmp_path / "even")
    (write_adapter(tmp_path / "odd") / "adapter_config.json").unlink()
    with pytest.raises(AdapterUnservable, match=r"'odd' cannot be merged: .* adapter_config.json"):
        fetch(open_source(tmp_path, tmp_path), recipe_of({"even": 1.0, "odd": 1.0}))


def test_excluded_modules_are_a_set(tmp_path: Path) -> None:
    for name, excluded in (("a", ["x", "y"]), ("b", ["y", "x"]), ("c", ["x"])):
        write_adapter(tmp_path / name, config_of(exclude_modules=excluded))
    source = open_source(tmp_path, tmp_path)
    assert fetch(source, recipe_of({"a": 1.0, "b": 1.0})).is_dir()
    with pytest.raises(AdapterUnservable, match="different exclude_modules cannot be merged: 'a'"):
        fetch(source, recipe_of({"a": 1.0, "c": 1.0}))


def test_a_full_disk_is_no_fault_of_the_adapters(
    source: MergedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 4096:  # the weights, and no record
            raise OSError(errno.ENOSPC, "No space left on device")

    recipe = recipe_of(HALVES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TierFull, match="no room left for the merged adapter"):
            fetch(source, recipe)
    assert source.list() == []
    assert fetch(source, recipe).is_dir()


@pytest.mark.parametrize("num_changes", [1, 2, 3])
def test_a_member_that_changes_meanwhile_is_read_again(tmp_path: Path, num_changes: int) -> None:
    for name in "ab":
        write_adapter(tmp_path / name)
    source, recipe = open_source(tmp_path, tmp_path), recipe_of({"a": 1.0, "b": 1.0})
    done = [0]

    def change(progress: FetchProgress) -> None:
        done.append(progress.done_bytes)
        num_merges = 1 + sum(b < a for a, b in pairwise(done))
        if num_merges <= num_changes:
            os.utime(tmp_path / "b" / "adapter_model.safetensors", ns=(0, num_merges))

    if num_changes < 3:
        assert source.fetch(recipe.key, "", change).is_dir()
        return
    with pytest.raises(SourceUnavailable, match="files of 'b' changed while it was merged"):
        source.fetch(recipe.key, "", change)
    assert source.list() == []
    assert fetch(source, recipe).is_dir()


def test_values_that_are_not_numbers_leave_nothing(tmp_path: Path) -> None:
    write_adapter(tmp_path / "even")
    tensors = tensors_of()
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")
    write_adapter(tmp_path / "odd", tensors=tensors)
    with pytest.raises(AdapterUnservable, match=r"'odd' cannot be merged: lora_B .* not finite"):
        fetch(open_source(tmp_path, tmp_path), recipe_of({"even": 1.0, "odd": 1.0}))
    assert not list((tmp_path / "disk" / ".partial").glob("*/*"))


@pytest.mark.parametrize(
    "key",
    [
        AdapterKey("merged", "linear(0.5*local:plain)"),
        AdapterKey("merged", "anything"),
        AdapterKey("merged", str(recipe_of(HALVES)), "v2"),
    ],
)
def test_a_key_that_is_no_recipe_is_refused(source: MergedSource, key: AdapterKey) -> None:
    with pytest.raises(AdapterUnservable):
        source.fetch(key, "", lambda _: None)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub().serve() as hub:
        for name, seed in (("a", 1), ("b", 2)):
            folder = write_adapter(tmp_path / "hub" / name, tensors=tensors_of(seed=seed))
            hub.repos[f"owner/{name}"] = Repo(folder)
        yield hub


def test_a_merge_is_for_those_who_may_read_every_member(hub: Hub, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "disk", 1 << 26)
    source = MergedSource(disk, {"hub": HubSource(disk, hub.endpoint)}, tiny_layout(), False)
    hub.repos["owner/b"].token = "hf_right"
    members = (AdapterKey("hub", "owner/a"), AdapterKey("hub", "owner/b"))
    key = MergeRecipe(tuple(Member(member, 0.5) for member in members)).key
    source.fetch(key, "hf_right", lambda _: None)
    assert source.list() == []
    source.authorize(key, "hf_right")
    for ask in (source.authorize, lambda key, token: source.fetch(key, token, lambda _: None)):
        for token in ("", "hf_wrong"):
            with pytest.raises(AdapterNotFound, match="'owner/b'"):
                ask(key, token)
    disk.drop(members[0])
    downloads = hub.count("GET /owner/a/resolve")
    source.authorize(key, "hf_right")
    assert hub.count("GET /owner/a/resolve") == 2 * downloads
    made = source.fetch(key, "hf_right", lambda _: None) / "adapter_model.safetensors"
    inode = made.stat().st_ino
    source.fetch(key, "hf_right", lambda _: None)
    assert made.stat().st_ino == inode  # the same commits, so it was not made again


def test_the_result_is_an_adapter_that_peft_reads(case: Case, source: MergedSource) -> None:
    recipe = recipe_of({"rslora": 0.4, "plain": 0.6})
    wanted = merged_by_peft(case.peft, recipe)
    directory = fetch(source, recipe)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert LoraConfig.from_pretrained(directory).lora_alpha == config["lora_alpha"]
    case.peft.load_adapter(directory, "read")
    for name, module in case.peft.base_model.model.named_modules():
        if name in wanted:
            assert torch.equal(module.lora_A["read"].weight, wanted[name][0])
    case.peft.delete_adapter("read")
