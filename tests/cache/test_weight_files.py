"""Weights in several safetensors files and in torch's pickles: the same adapter, or a refusal."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.cache.adapter_files import digest_files, read_spec
from lorafleet.cache.errors import AdapterUnservable, SourceUnavailable
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packing import pack
from tests.cache.adapter_cases import (
    config_of,
    pickle_weights,
    split_weights,
    tensors_of,
    tiny_layout,
    write_adapter,
)

INDEX = "adapter_model.safetensors.index.json"
PARTS = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
LAYOUT = tiny_layout()
FORMS: dict[str, Callable[[Path], Path]] = {
    "sharded": split_weights,
    "bin": pickle_weights,
    "pt": lambda directory: pickle_weights(directory, "adapter_model.pt"),
}


def packed(directory: Path) -> torch.Tensor:
    spec = read_spec(directory, LAYOUT, allow_pickles=True)
    adapter = allocate(spec.form(LAYOUT, 4), torch.float32, pin=False)
    done: list[int] = []
    pack(spec, LAYOUT, adapter, done.append)
    assert done[-1] == sum(tensor.nbytes for tensor in tensors_of().values())
    return adapter.buffer


def refusal(directory: Path) -> str:
    with pytest.raises(AdapterUnservable) as caught:
        packed(directory)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_packs_alike(form: str, tmp_path: Path) -> None:
    whole = packed(write_adapter(tmp_path / "whole"))
    assert torch.equal(packed(FORMS[form](write_adapter(tmp_path / form))), whole)


@pytest.mark.parametrize("form", FORMS)
def test_every_file_counts_and_is_watched(form: str, tmp_path: Path) -> None:
    directory = FORMS[form](write_adapter(tmp_path))
    files = sorted(path for path in directory.iterdir() if path.name.startswith("adapter_model"))
    for path in files:
        spec = read_spec(directory, LAYOUT, allow_pickles=True)
        assert spec.nbytes == sum(file.stat().st_size for file in directory.iterdir())
        before = digest_files(spec, lambda done: None)
        assert spec.is_current()
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        assert not spec.is_current()
        assert digest_files(spec, lambda done: None) != before


def test_one_file_comes_before_the_others(tmp_path: Path) -> None:
    directory = split_weights(write_adapter(tmp_path))
    (directory / PARTS[0]).write_bytes(b"nonsense")
    write_adapter(directory)
    assert packed(directory).numel()


def test_a_part_that_is_not_there_or_not_whole_is_named(tmp_path: Path) -> None:
    directory = split_weights(write_adapter(tmp_path))
    content = (directory / PARTS[1]).read_bytes()
    (directory / PARTS[1]).write_bytes(content[:-1])
    assert f"{PARTS[1]} is corrupt" in refusal(directory)
    (directory / PARTS[1]).unlink()
    assert f"no {PARTS[1]}" in refusal(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: b"{", "not valid JSON"),
        (lambda index: b"[" * 100_000, "not valid JSON"),
        (lambda index: b" " * ((16 << 20) + 1), "larger than"),
        (lambda index: b"[]", "not a JSON object"),
        (lambda index: b'{"a": [' + b"[]," * 200_000 + b"[]]}", "200003 lists and objects"),
        (lambda index: {}, "no weight_map"),
        (lambda index: {"weight_map": {"a": 1}}, "no weight_map"),
        (lambda index: {"weight_map": {"a": "../adapter_model-1.safetensors"}}, "names the file"),
        (lambda index: {"weight_map": {"a": "/etc/passwd"}}, "names the file"),
        (lambda index: {"weight_map": {"a": "adapter_model-2/../../x.safetensors"}}, "names the"),
        (lambda index: {"weight_map": index | {"a": PARTS[0]}}, f"{PARTS[0]} holds other tensors"),
        (lambda index: {"weight_map": dict.fromkeys(index, PARTS[1])}, "holds other tensors"),
        (lambda index: {"weight_map": dict(list(index.items())[1:])}, "holds other tensors"),
        (lambda index: {"weight_map": {}}, "no tensors"),
    ],
)
def test_an_index_that_is_wrong_is_refused(
    change: Callable[[dict[str, str]], Any], said: str, tmp_path: Path
) -> None:
    directory = split_weights(write_adapter(tmp_path))
    index = change(json.loads((directory / INDEX).read_text())["weight_map"])
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    (directory / INDEX).write_bytes(content)
    assert said in refusal(directory)


def test_pickles_are_an_operators_choice(tmp_path: Path) -> None:
    directory = pickle_weights(write_adapter(tmp_path))
    with pytest.raises(AdapterUnservable, match=r"adapter_model\.bin.*--allow-pickled-adapters"):
        read_spec(directory, LAYOUT)


class Hostile:
    """Makes a directory when it is unpickled by whoever lets it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def with_pickle(content: bytes) -> bytes:
    """A file as torch.save lays it out, with another pickle in it."""
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            is_pickle = member.filename.endswith("data.pkl")
            new.writestr(member.filename, content if is_pickle else old.read(member.filename))
    return out.getvalue()


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def longer_than_its_record() -> bytes:
    """A tensor with more elements than its record in the archive has."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(tensors_of()))) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 16 if name.endswith("data/0") else None])
    return out.getvalue()


def shared_tuples(depth: int) -> bytes:
    """An archive with a key of 2 to the power of `depth` parts, in a few bytes for each."""
    doubled = b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"a"
        for i in range(1, depth + 1)
    )
    return with_pickle(b"\x80\x02]q\x00)q\x01a" + doubled + b"}h" + bytes([depth + 1]) + b"K\x00s.")


def behind_the_older_format() -> bytes:
    """Which torch reads by a file's first bytes, where a zip archive is found by its last."""
    return _legacy(tensors_of()) + saved(tensors_of())


NAME = next(iter(tensors_of()))
HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "a call": lambda trap: with_pickle(pickle.dumps({NAME: Hostile(trap)}, protocol=2)),
    "a call beside tensors": lambda trap: saved(tensors_of() | {"x": Hostile(trap)}),
    "a bare pickle": lambda trap: pickle.dumps(Hostile(trap)),
    "torch's older format": lambda trap: _legacy({NAME: Hostile(trap)}),
    "a global": lambda trap: with_pickle(b"cos\nsystem\n."),
    "longer than its record": lambda trap: longer_than_its_record(),
    "one element for all": lambda trap: saved({NAME: torch.zeros(1).expand(4, 1 << 40)}),
    "no dict": lambda trap: saved(torch.zeros(4)),
    "no tensors": lambda trap: saved({NAME: [1, 2]}),
    "no names": lambda trap: saved({3: torch.zeros(4)}),
    "sparse": lambda trap: saved({NAME: torch.eye(4).to_sparse()}),
    "integers": lambda trap: saved(tensors_of() | {NAME: torch.zeros(4, 32, dtype=torch.int64)}),
    "other shapes": lambda trap: saved(tensors_of() | {NAME: torch.zeros(5, 32)}),
    "nothing": lambda trap: b"",
    "tuples in tuples": lambda trap: shared_tuples(16),
    "tuples in a tuple, deep": lambda trap: with_pickle(
        b"\x80\x02})" + b"\x85" * 2000 + b"K\x00s."
    ),
    "a vast pickle": lambda trap: with_pickle(b"\x80\x02" + b"N0" * (8 << 20) + b"}."),
    "another archive behind it": lambda trap: behind_the_older_format(),
    "cut short": lambda trap: saved(tensors_of())[:-100],
}


def _legacy(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_executes_nothing(name: str, tmp_path: Path) -> None:
    directory = pickle_weights(write_adapter(tmp_path / "adapter"))
    (directory / "adapter_model.bin").write_bytes(HOSTILE[name](tmp_path / "trap"))
    sentence = refusal(directory)
    assert not (tmp_path / "trap").exists()
    assert "adapter_model.bin" in sentence or "lora_A of" in sentence


@pytest.mark.parametrize("depth", [12, 16])
def test_objects_larger_than_a_tensor_are_not_made(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = pickle_weights(write_adapter(tmp_path / "adapter"))
    (directory / "adapter_model.bin").write_bytes(shared_tuples(depth))
    monkeypatch.setattr(torch, "load", None)
    assert "more than 1000 parts" in refusal(directory)


def test_a_compressed_archive_is_refused_unread(tmp_path: Path) -> None:
    directory = pickle_weights(write_adapter(tmp_path))
    path, out = directory / "adapter_model.bin", io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path.write_bytes(out.getvalue())
    assert refusal(directory) == "adapter_model.bin is compressed, which torch.save does not do."


def test_the_trap_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


def test_tensors_that_are_views_or_parameters(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter")
    whole = packed(directory)
    turned = {name: torch.nn.Parameter(t.t().contiguous().t()) for name, t in tensors_of().items()}
    (directory / "adapter_model.safetensors").unlink()
    torch.save(turned, directory / "adapter_model.bin")
    assert torch.equal(packed(directory), whole)


def test_a_pickle_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    directory = pickle_weights(write_adapter(tmp_path))
    spec = read_spec(directory, LAYOUT, allow_pickles=True)
    adapter = allocate(spec.form(LAYOUT, 4), torch.float32, pin=False)
    torch.save(tensors_of(rank=2), directory / "adapter_model.bin")
    (directory / "adapter_config.json").write_text(json.dumps(config_of(2)))
    with pytest.raises(SourceUnavailable, match="changed while it was read"):
        pack(spec, LAYOUT, adapter, lambda done: None)
