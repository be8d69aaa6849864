"""Local adapters: names and paths under the root, and no way out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.cache.errors import AdapterNotFound
from lorafleet.cache.sources.local import LocalSource, root_paths
from lorafleet.proto.messages import AdapterKey
from tests.cache.adapter_cases import split_weights, write_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "root" / "plain")
    write_adapter(tmp_path / "root" / "owner" / "nested")
    write_adapter(tmp_path / "root" / "plain" / "checkpoint-10")
    write_adapter(tmp_path / "secret")
    return tmp_path / "root"


def fetch(root: str | Path, name: str, revision: str = "") -> Path:
    return LocalSource(str(root)).fetch(AdapterKey("local", name, revision), "", print)


def test_finds_names_and_paths_inside(root: Path) -> None:
    assert fetch(root, "plain") == root / "plain"
    assert fetch(root, "owner/nested") == root / "owner" / "nested"
    assert fetch(root, "plain/checkpoint-10") == root / "plain" / "checkpoint-10"


@pytest.mark.parametrize(
    "name", ["plain/", "./plain", "owner//nested", "owner/./nested", "owner/../plain", "/{}/plain"]
)
def test_finds_nothing_by_a_second_spelling(root: Path, name: str) -> None:
    with pytest.raises(AdapterNotFound):
        fetch(root, name.format(root))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../secret", "/", "/etc", "nothing", "plain/../../secret", "a\0b", "x" * 5000],
)
def test_refuses_what_is_not_an_adapter_under_the_root(root: Path, name: str) -> None:
    with pytest.raises(AdapterNotFound):
        fetch(root, name)


def test_an_absolute_path_outside_is_refused(root: Path) -> None:
    with pytest.raises(AdapterNotFound):
        fetch(root, str(root.parent / "secret"))


def test_a_directory_that_links_out_is_refused(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    with pytest.raises(AdapterNotFound):
        fetch(root, "link")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_links_out_is_refused(root: Path, name: str) -> None:
    (root / "plain" / name).unlink()
    (root / "plain" / name).symlink_to(root.parent / "secret" / name)
    with pytest.raises(AdapterNotFound):
        fetch(root, "plain")


def test_links_inside_the_root_are_followed(root: Path) -> None:
    (root / "alias").symlink_to(root / "plain")
    assert fetch(root, "alias") == root / "plain"


def test_a_root_that_is_a_link_works(root: Path) -> None:
    (root.parent / "other").symlink_to(root)
    assert fetch(root.parent / "other", "plain") == root / "plain"


def test_the_roots_paths_are_the_named_one_and_the_real_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = str(root.resolve())
    (root.parent / "other").symlink_to(root)
    (root / "out").symlink_to(root.parent / "secret")
    monkeypatch.chdir(root.parent)
    assert root_paths(real) == root_paths("root/") == root_paths("./secret/../root") == [real]
    assert root_paths("other") == [f"{root.parent}/other", real]
    assert root_paths("root/out/../root") == [real]  # root/root is another folder, or none
    assert root_paths("") == []


def test_a_root_that_no_request_can_name_has_no_paths(tmp_path: Path) -> None:
    assert root_paths(f"{tmp_path}/\udcff") == []


def test_without_a_root_everything_is_refused() -> None:
    with pytest.raises(AdapterNotFound, match="no adapter root"):
        fetch("", "plain")
    assert LocalSource("").list() == []


def test_there_are_no_revisions(root: Path) -> None:
    with pytest.raises(AdapterNotFound, match="no revision 'main'"):
        fetch(root, "plain", "main")


def test_lists_adapters_two_levels_deep(root: Path) -> None:
    write_adapter(root / "too" / "deep" / "down")
    assert [key.id for key, _ in LocalSource(str(root)).list()] == ["owner/nested", "plain"]


def test_a_part_of_the_weights_that_links_out_is_refused(root: Path) -> None:
    adapter = split_weights(write_adapter(root / "parts"))
    assert fetch(root, "parts") == adapter
    part = next(adapter.glob("adapter_model-00002*"))
    part.rename(root.parent / "elsewhere")
    part.symlink_to(root.parent / "elsewhere")
    with pytest.raises(AdapterNotFound):
        fetch(root, "parts")
