"""What an adapter may change of the vocabulary, what each rank holds of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packing import pack
from lorafleet.cache.store import AdapterStore
from lorafleet.cache.vocabulary_parts import digits
from lorafleet.proto.messages import AdapterKey, FetchAdapterRequest, Tier
from tests.cache.adapter_cases import (
    HIDDEN,
    VOCAB,
    KnownWeights,
    Settings,
    config_of,
    tensors_of,
    tiny_layout,
    write_adapter,
)

PREFIX = "base_model.model."
EMBED, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
DELTA = ".token_adapter.trainable_tokens_delta"


def table(rows: int) -> torch.Tensor:
    """Rows that say their own number."""
    return torch.arange(rows).float().unsqueeze(1).expand(rows, HIDDEN).contiguous()


def parts(
    directory: Path, rank: int, world: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    layout = tiny_layout(rank, world)
    spec = read_spec(directory, layout)
    packed = allocate(spec.form(layout, dtype.itemsize), dtype, pin=False)
    pack(spec, layout, packed, lambda done: None)
    return {
        part.name: packed.buffer[part.offset : part.offset + part.num_elements].view(part.shape)
        for part in packed.form.parts
    }


def write(directory: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    return write_adapter(directory, config_of(**fields), tensors_of() | tensors)


def refusal(directory: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> str:
    with pytest.raises(AdapterUnservable) as caught:
        read_spec(write(directory, tensors, **fields), tiny_layout())
    return str(caught.value)


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (VOCAB, [range(32), range(32, 64)]),
        (VOCAB + 3, [[*range(32), 64, 65, 66], [*range(32, 64), 64, 65, 66]]),
        (40, [range(32), range(32, 40)]),
        (20, [range(20), []]),
    ],
)
def test_a_rank_holds_its_entries_of_the_base_and_all_added_ones(
    tmp_path: Path, count: int, wanted: list[list[int]]
) -> None:
    directory = write(tmp_path, {f"{HEAD}.weight": table(count)}, modules_to_save=["lm_head"])
    for rank, rows in enumerate(wanted):
        found = parts(directory, rank, 2)["lm_head.weight"]
        assert found[:, 0].tolist() == list(rows)


def test_trained_tokens_go_to_the_rank_that_has_them(tmp_path: Path) -> None:
    tensors = {EMBED + DELTA: table(4) + 100}
    directory = write(tmp_path, tensors, trainable_token_indices=[40, 3, 63, 0])
    first, second = (parts(directory, rank, 2) for rank in (0, 1))
    assert torch.equal(first["model.embed_tokens.token_index"], digits([0, 3]))
    assert first["model.embed_tokens.token_rows"][:, 0].tolist() == [103, 101]
    assert torch.equal(second["model.embed_tokens.token_index"], digits([8, 31]))
    assert second["model.embed_tokens.token_rows"][:, 0].tolist() == [100, 102]
    assert first.keys() == second.keys()  # ranks must compute in step


def test_a_rank_without_trained_tokens_has_the_parts_all_the_same(tmp_path: Path) -> None:
    directory = write(tmp_path, {HEAD + DELTA: table(1)}, trainable_token_indices={"lm_head": [3]})
    assert parts(directory, 1, 2)["lm_head.token_rows"].shape == (0, HIDDEN)


def test_trained_tokens_of_a_table_of_its_own_are_put_into_it(tmp_path: Path) -> None:
    tensors = {f"{EMBED}.token_adapter.base_layer.weight": table(66), EMBED + DELTA: table(2) + 100}
    directory = write(tmp_path, tensors, trainable_token_indices=[65, 2])
    found = parts(directory, 0, 1)["model.embed_tokens.weight"][:, 0].tolist()
    assert found == [0, 1, 101, *range(3, 65), 100]
    assert read_spec(directory, tiny_layout()).num_tokens == 66


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_digits_are_exact_in_every_type(dtype: torch.dtype) -> None:
    numbers = [0, 1, 255, 256, 65_535, 65_536, 151_936, (1 << 24) - 1]
    found = digits(numbers).to(dtype).double()
    assert (found @ torch.tensor([1, 256, 65_536]).double()).tolist() == numbers


def test_an_adapter_without_lora_on_linears(tmp_path: Path) -> None:
    write_adapter(
        tmp_path, config_of(modules_to_save=["lm_head"]), {f"{HEAD}.weight": table(VOCAB)}
    )
    spec = read_spec(tmp_path, tiny_layout())
    assert (spec.rank, spec.target_modules, spec.modules) == (0, ["lm_head"], {})


def test_ranks_of_the_vocabularys_lora_count(tmp_path: Path) -> None:
    tensors = {
        f"{EMBED}.lora_embedding_A": torch.zeros(9, VOCAB),
        f"{EMBED}.lora_embedding_B": torch.zeros(HIDDEN, 9),
    }
    spec = read_spec(write(tmp_path, tensors, rank_pattern={"embed_tokens": 9}), tiny_layout())
    assert (spec.rank, spec.target_modules) == (9, ["embed_tokens", "q_proj"])


def test_the_head_has_another_name_in_tinkers_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, HIDDEN), torch.randn(VOCAB, 4)
    peft = {f"{HEAD}.lora_A.weight": a, f"{HEAD}.lora_B.weight": b}
    tinker = {name.replace("lm_head", "model.unembed_tokens"): t for name, t in peft.items()}
    wanted, found = (
        parts(write(tmp_path / "a", peft), 0, 2),
        parts(write(tmp_path / "b", tinker), 0, 2),
    )
    assert wanted.keys() == found.keys() == {"lm_head.lora_rows", "lm_head.lora_basis"}
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    both = peft | {name: t.clone() for name, t in tinker.items()}
    assert "twice" in refusal(tmp_path / "both", both)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = table(VOCAB)
    weights[50, 3] = torch.nan
    directory = write(tmp_path, {f"{HEAD}.weight": weights}, modules_to_save=["lm_head"])
    for rank in range(2):  # also by the rank that does not hold the row
        with pytest.raises(AdapterUnservable, match=r"lm_head\.weight holds values"):
            parts(directory, rank, 2)


@pytest.mark.parametrize(
    ("tensors", "fields", "said"),
    [
        ({f"{HEAD}.weight": torch.zeros(VOCAB, HIDDEN + 1)}, {}, "lm_head.weight"),
        ({f"{HEAD}.weight": torch.zeros(0, HIDDEN)}, {}, "lm_head.weight"),
        ({f"{HEAD}.weight": torch.zeros(())}, {}, "lm_head.weight"),
        ({f"{HEAD}.weight": torch.zeros(VOCAB, HIDDEN).int()}, {}, "is I32"),
        ({f"{HEAD}.lora_A.weight": torch.zeros(4, HIDDEN)}, {}, "not its other half"),
        (
            {
                f"{HEAD}.lora_A.weight": torch.zeros(4, HIDDEN),
                f"{HEAD}.lora_B.weight": torch.zeros(VOCAB + 1, 4),
            },
            {},
            "lm_head.lora_B.weight",
        ),
        ({EMBED + DELTA: torch.zeros(1, HIDDEN)}, {}, "only the weights of trainable_token"),
        (
            {EMBED + DELTA: torch.zeros(1, HIDDEN)},
            {"trainable_token_indices": [VOCAB]},
            f"names token {VOCAB}; model.embed_tokens has {VOCAB}",
        ),
        (
            {EMBED + DELTA: torch.zeros(1, HIDDEN)},
            {"trainable_token_indices": [1, 2]},
            "trainable_tokens_delta",
        ),
        (
            {EMBED + DELTA: torch.zeros(1, HIDDEN), f"{EMBED}.weight": table(VOCAB)},
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "modules_to_save and trainable_token_indices both change model.embed_tokens",
        ),
        ({f"{PREFIX}model.norm.weight": torch.zeros(HIDDEN)}, {}, "model.norm.weight"),
    ],
)
def test_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any], said: str
) -> None:
    assert said in refusal(tmp_path, tensors, **fields)


def test_the_store_gives_copies_of_the_base_no_room(tmp_path: Path) -> None:
    base = KnownWeights({"model.embed_tokens.weight": table(VOCAB)})
    changed = table(VOCAB + 2)
    changed[7] += 1
    config = Settings(str(tmp_path / "root"), str(tmp_path / "cache"))
    write(tmp_path / "root" / "one", {f"{EMBED}.weight": changed})
    request = FetchAdapterRequest(AdapterKey("local", "one"), Tier.HOST)
    sizes = []
    for weights in (None, base):
        store = AdapterStore(
            config, tiny_layout(), torch.bfloat16, torch.device("cpu"), base=weights
        )
        info = store.fetch(request, lambda progress: None)
        packed = store.host(info.content)
        assert info.packed_bytes == packed.nbytes
        assert info.vocab_size == VOCAB + 2
        sizes.append(packed.nbytes)
    found = {
        part.name: packed.buffer[part.offset : part.offset + part.num_elements].view(part.shape)
        for part in packed.form.parts
    }
    assert found["model.embed_tokens.added_rows"][:, 0].tolist() == [64, 65]
    assert found["model.embed_tokens.token_rows"][:, 0].tolist() == [8]
    assert torch.equal(found["model.embed_tokens.token_index"].float(), digits([7]))
    assert sizes[1] < sizes[0] - 50 * HIDDEN * 2  # alignment takes some
