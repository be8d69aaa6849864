"""Local ids: one spelling for each folder under the root, and none for what is not under it."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cache.sources.local_id import is_local_id, local_id

ROOTS = ["/srv/link to adapters", "/data/größe"]
# What folders may be called; "." and ".." are none of their names.
NAMES = st.one_of(
    st.sampled_from(["json", "...", "..json", ".hidden", " ", "größe", "🎉", "~", "a\\b", "%2e"]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1),
).filter(lambda name: name not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=4)
SEPARATORS = st.sampled_from(["/", "//", "/./", "///.//"])


@given(PATHS)
def test_an_id_in_its_one_spelling_is_left_as_it_is(parts: list[str]) -> None:
    assert local_id("/".join(parts), ROOTS) == "/".join(parts)
    assert is_local_id("/".join(parts))


@given(PATHS, st.data(), st.sampled_from(["", "./", ".//./", *(f"{root}//" for root in ROOTS)]))
def test_every_other_spelling_is_brought_to_it(
    parts: list[str], data: st.DataObject, head: str
) -> None:
    text = head + parts[0]
    for part in parts[1:]:
        text += data.draw(SEPARATORS) + part
    text += data.draw(st.sampled_from(["", "/", "//", "/.", "/./"]))
    assert local_id(text, ROOTS) == "/".join(parts)
    assert is_local_id(text) == (text == "/".join(parts))


@given(st.text(st.sampled_from("./a é"), max_size=12))
def test_whatever_is_accepted_names_the_folder_it_named(text: str) -> None:
    try:
        found = local_id(text, ["/"])
    except ValueError:
        assert ".." in text.split("/") or not text.strip("./"), text
        return
    assert os.path.join("/", found) == os.path.normpath(f"/{text.lstrip('/')}")
    assert is_local_id(found)


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "/", "./", "..", "../json", "a/../json", "json/..", "/etc", "//", "/..",
        "/srv", "/srv/link to adapters", "/srv/link to adapters/", "/srv/link to adapters/../json",
        "/srv/link to adapters2/json", "/data/json", "/srv/link  to adapters/json",
    ],
)  # fmt: skip
def test_what_is_not_under_the_root_for_certain_has_no_id(text: str) -> None:
    with pytest.raises(ValueError, match="relative to --adapter-root, without"):
        local_id(text, ROOTS)
    assert not is_local_id(text)


def test_the_named_root_goes_before_the_one_it_leads_to() -> None:
    assert local_id("/data/adapters/json", ["/data/adapters", "/data"]) == "json"
    assert local_id("//data/./adapters//json", ["/data/adapters/"]) == "json"
    assert local_id("/json", ["/"]) == "json"
    with pytest.raises(ValueError, match="absolute"):
        local_id("/data/adapters/json")
