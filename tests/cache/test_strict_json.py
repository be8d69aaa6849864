"""JSON from outside: what two readers could read differently is refused."""

from __future__ import annotations

import json

import pytest

from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.strict_json import read_object


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"r": 8, "r": 16}', "has the key 'r' twice"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "has the key 'b' twice"),
        (b'{"a": \xff}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": ' + b"[" * 90_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": [' + b"[]," * 200_000 + b"[]]}", "200003 lists and objects"),
        (b"[]", "not a JSON object"),
        (b"", "not valid JSON"),
    ],
)
def test_what_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(AdapterUnservable, match=words):
        read_object("x.json", text)


def test_a_header_of_many_tensors_is_read() -> None:
    entry = {"dtype": "F32", "shape": [8, 64], "data_offsets": [0, 2048]}
    header = {f"base_model.model.layers.{i}.lora_A.weight": entry for i in range(60_000)}
    assert read_object("x.json", json.dumps(header).encode()) == header


def test_the_last_of_many_keys_twice_is_found_in_passing() -> None:
    """At one look for each key. With a look at all before it this takes minutes, not a moment."""
    keys = [f'"{number}":1' for number in [*range(300_000), 299_999]]
    with pytest.raises(AdapterUnservable, match="'299999' twice"):
        read_object("x.json", f"{{{','.join(keys)}}}".encode())
