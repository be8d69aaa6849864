"""The tokenizer an adapter ships: from every source, in the digest, within its limits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafleet.cache import tokenizer_files
from lorafleet.cache.adapter_files import digest_files, read_spec
from lorafleet.cache.errors import AdapterNotFound, AdapterUnservable
from lorafleet.cache.sources.archive import unpack
from lorafleet.cache.sources.local import LocalSource
from lorafleet.cache.store import AdapterStore
from lorafleet.cache.tokenizer_files import (
    MAX_TOKENIZER_BYTES,
    is_same_tokenizer,
    parse_tokenizer,
    read_tokenizer,
)
from lorafleet.proto.messages import AdapterInfo, AdapterKey, FetchAdapterRequest, Tier
from tests.cache.adapter_cases import Settings, tiny_layout, write_adapter
from tests.cache.archive_cases import tar_of, zip_of
from tests.cache.hub_stand_in import Hub, Repo

SHIPPED = {
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"eos_token": "</s>"}',
    "special_tokens_map.json": b'{"bos_token": "<s>", "eos_token": "other"}',
    "chat_template.jinja": b"{{ messages }}",
}
LOCAL, HUB = AdapterKey("local", "one"), AdapterKey("hub", "owner/adapter")


def ship(directory: Path, **changes: bytes) -> Path:
    for name, content in (SHIPPED | changes).items():
        (directory / name).write_bytes(content)
    return directory


def store_of(root: Path, hub: Hub | None = None) -> AdapterStore:
    config = Settings(str(root), str(root.parent / "cache"))
    endpoint = hub.endpoint if hub else None
    return AdapterStore(config, tiny_layout(), torch.float32, torch.device("cpu"), endpoint)


def fetch(store: AdapterStore, key: AdapterKey, tier: Tier = Tier.HOST) -> AdapterInfo:
    return store.fetch(FetchAdapterRequest(key, tier), lambda progress: None)


def test_files_become_a_tokenizer_and_one_configuration(tmp_path: Path) -> None:
    found = read_tokenizer(ship(tmp_path))
    assert found.tokenizer_json == SHIPPED["tokenizer.json"]
    assert json.loads(found.config_json) == {
        "eos_token": "</s>",
        "bos_token": "<s>",
        "chat_template": "{{ messages }}",
    }
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}!")
    assert read_tokenizer(tmp_path).digest != found.digest


def test_nothing_shipped_is_nothing(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path).digest == ""
    write_adapter(tmp_path / "root" / "one")
    assert fetch(store_of(tmp_path / "root"), LOCAL).tokenizer_digest == ""


@pytest.mark.parametrize("name", SHIPPED)
def test_every_file_is_in_the_digest_and_watched(tmp_path: Path, name: str) -> None:
    spec = read_spec(ship(write_adapter(tmp_path)), tiny_layout())
    digest = digest_files(spec, lambda done: None)
    (tmp_path / name).write_bytes(SHIPPED[name] + b" ")
    assert not spec.is_current()
    spec = read_spec(tmp_path, tiny_layout())
    assert digest_files(spec, lambda done: None) != digest
    (tmp_path / name).unlink()
    assert not spec.is_current()


def test_the_store_hands_out_what_it_fetched(tmp_path: Path) -> None:
    ship(write_adapter(tmp_path / "root" / "one"))
    store = store_of(tmp_path / "root")
    with pytest.raises(AdapterNotFound):
        store.tokenizer(LOCAL)
    info = fetch(store, LOCAL)
    found = store.tokenizer(LOCAL)
    assert info.tokenizer_digest == found.digest != ""
    assert found.tokenizer_json == SHIPPED["tokenizer.json"]
    assert info.vocab_size == 64


def test_the_hub_gives_them(tmp_path: Path) -> None:
    with Hub().serve() as hub:
        hub.repos["owner/adapter"] = Repo(ship(write_adapter(tmp_path / "hub")))
        (tmp_path / "root").mkdir()
        store = store_of(tmp_path / "root", hub)
        info = fetch(store, HUB)
        assert info.tokenizer_digest == read_tokenizer(tmp_path / "hub").digest
        files = list((tmp_path / "hub").iterdir())
        assert info.disk_bytes == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_archives_have_them(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    source = ship(write_adapter(tmp_path / "source"))
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "archive").write_bytes(pack(files | {"vocab.json": b"{}"}))
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "archive", tmp_path / "out", 1 << 20, lambda nbytes: None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_that_links_out_of_the_root_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    folder = write_adapter(tmp_path / "root" / "one")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterNotFound):
        LocalSource(str(tmp_path / "root")).fetch(LOCAL, "", lambda progress: None)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(write_adapter(tmp_path))
    os.truncate(tmp_path / name, MAX_TOKENIZER_BYTES[name] + 1)
    with pytest.raises(AdapterUnservable, match=f"{name} has .* bytes; it may have"):
        read_spec(tmp_path, tiny_layout())
    monkeypatch.setitem(tokenizer_files.MAX_TOKENIZER_BYTES, name, 4)
    with Hub().serve() as hub:
        hub.repos["owner/adapter"] = Repo(ship(write_adapter(tmp_path / "hub")))
        (tmp_path / "root").mkdir()
        with pytest.raises(AdapterUnservable, match=name):
            fetch(store_of(tmp_path / "root", hub), HUB)
        assert hub.count("/resolve/") == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"[" * 100_000),
        ("special_tokens_map.json", b"3"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"x": [' + b"[]," * 200_000 + b"[]]}"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    ship(write_adapter(tmp_path / "root" / "one"), **{name: content})
    with pytest.raises(AdapterUnservable, match=name):
        fetch(store_of(tmp_path / "root"), LOCAL, Tier.DISK)


@pytest.mark.parametrize(
    "content",
    [
        b"no JSON",
        b"[]",
        b'{"x": [' + b"[]," * 200_000 + b"[]]}",
        b'{"x": [' + b'"abcdefg",' * 3_000_000 + b"1]}",
    ],
)
def test_a_tokenizer_is_handed_on_unread_and_named_by_who_parses_it(
    tmp_path: Path, content: bytes
) -> None:
    ship(write_adapter(tmp_path / "root" / "one"), **{"tokenizer.json": content})
    store = store_of(tmp_path / "root")
    fetch(store, LOCAL, Tier.DISK)
    assert store.tokenizer(LOCAL).tokenizer_json == content
    with pytest.raises(AdapterUnservable, match=r"tokenizer\.json"):
        parse_tokenizer(content)


def test_the_same_tokenizer_in_another_form() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "a b": 3}
    new = {"model": {"vocab": vocab, "merges": [["a", "b"]], "ignore_merges": False}}
    old = {"model": {"vocab": vocab, "merges": ["a b"]}, "truncation": {"max_length": 3}}
    assert is_same_tokenizer(new, old)
    for merges in ([["a", "b"]] * 2, [["a b", "c"]], [["a", "b c"]], [["a", "b", "c"]], ["b a"]):
        assert not is_same_tokenizer(new, {"model": {"vocab": vocab, "merges": merges}})
    assert not is_same_tokenizer(
        {"model": {"merges": [["a b", "c"]]}}, {"model": {"merges": [["a", "b c"]]}}
    )
    assert not is_same_tokenizer(
        {"model": {"merges": [["a", "b", "c"]]}}, {"model": {"merges": ["a b c"]}}
    )
    assert not is_same_tokenizer(new, {"model": new["model"] | {"ignore_merges": True}})
    assert not is_same_tokenizer(new, {"model": None})
