"""Archives: what is taken out of them, and what is refused before anything is written."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.cache.errors import AdapterUnservable, TierFull
from lorafleet.cache.sources.archive import unpack
from tests.cache.adapter_cases import pickle_weights, split_weights, write_adapter
from tests.cache.archive_cases import FILES, REFUSED, Case, adapter_files, tar_of, zip_of

MAX_BYTES = 64 << 20


def unpacked(tmp_path: Path, content: bytes, reserve: Callable[[int], None] | None = None) -> Path:
    (tmp_path / "archive").write_bytes(content)
    target = tmp_path / "out"
    target.mkdir()
    sizes: list[int] = []
    total = unpack(tmp_path / "archive", target, MAX_BYTES, reserve or sizes.append)
    assert total == sum(path.stat().st_size for path in target.iterdir())
    assert reserve or sizes == [total]
    return target


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize("prefix", ["", "./", "adapter-main/"])
def test_takes_the_two_files_and_nothing_else(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes], prefix: str
) -> None:
    files = adapter_files(tmp_path / "adapter")
    more = {"README.md": b"read", "checkpoint-1/deep/adapter_config.json": b"{}"}
    content = pack({f"{prefix}{name}": text for name, text in {**files, **more}.items()})
    target = unpacked(tmp_path, content)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files


def test_takes_what_the_systems_tar_writes(tmp_path: Path) -> None:
    files = adapter_files(tmp_path / "adapter")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tmp_path / "adapter", "an adapter of a long name " + "x" * 200)
    target = unpacked(tmp_path, packed.getvalue())
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refuses(tmp_path: Path, case: Case) -> None:
    make, words = case
    content = make(adapter_files(tmp_path / "adapter"))
    tracemalloc.start()
    try:
        with pytest.raises(AdapterUnservable, match=words):
            unpacked(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    written = [path.name for path in (tmp_path / "out").iterdir()]
    assert set(written) <= set(FILES)  # a bad checksum is known at the end of a file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "archive", "out"]


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    def full(nbytes: int) -> None:
        raise TierFull("no room")

    with pytest.raises(TierFull):
        unpacked(tmp_path, tar_of(adapter_files(tmp_path / "adapter")), full)
    assert list((tmp_path / "out").iterdir()) == []


def test_takes_every_file_of_sharded_weights(tmp_path: Path) -> None:
    folder = split_weights(write_adapter(tmp_path / "adapter"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 4
    target = unpacked(tmp_path, tar_of(files | {"other.safetensors": b""}))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files


def test_takes_pickled_weights_only_if_allowed(tmp_path: Path) -> None:
    folder = pickle_weights(write_adapter(tmp_path / "adapter"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(AdapterUnservable, match="--allow-pickled-adapters"):
        unpacked(tmp_path, zip_of(files))
    unpack(tmp_path / "archive", tmp_path / "out", MAX_BYTES, lambda total: None, True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == files.keys()
