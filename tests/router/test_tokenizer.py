"""Incremental text equals the tokenizer's own decode of everything at once."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as TokenizerFile
from tokenizers import decoders, models

from lorafleet.router.errors import AdapterUnservable, InvalidRequest
from lorafleet.router.tokenizer import Tokenizer
from tests.router.tokenizers_for_tests import byte_level, llama_style, metaspace, word_piece

Build = Callable[[], TokenizerFile]
KINDS = [byte_level, llama_style, metaspace, word_piece]
_ours: dict[Build, Tokenizer] = {}


def ours(build: Build) -> Tokenizer:
    if build not in _ours:
        _ours[build] = Tokenizer(build().to_str().encode(), 1)
    return _ours[build]


def steps(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*map(detokenizer.step, ids), detokenizer.flush()]


def id_of(build: Build, piece: str) -> int:
    token_id = build().token_to_id(piece)
    assert token_id is not None
    return token_id


def ids_of(build: Build) -> st.SearchStrategy[list[int]]:
    # Past the vocabulary too: a model's logits may be wider than its tokenizer.
    return st.lists(st.integers(0, build().get_vocab_size() + 3), max_size=40)


@pytest.mark.parametrize("build", KINDS)
@given(data=st.data())
def test_any_ids_without_a_prompt_decode_as_at_once(build: Build, data: st.DataObject) -> None:
    ids = data.draw(ids_of(build))
    texts = steps(ours(build), [], ids)
    assert "".join(texts) == build().decode(ids)


@pytest.mark.parametrize("build", KINDS)
@given(data=st.data(), prompt=st.text(min_size=1), text=st.text())
def test_text_continues_its_prompt(
    build: Build, data: st.DataObject, prompt: str, text: str
) -> None:
    prompt_ids = build().encode(prompt, add_special_tokens=False).ids
    ids = build().encode(text, add_special_tokens=False).ids
    cut = data.draw(st.integers(0, len(ids)))
    texts = steps(ours(build), prompt_ids, ids)
    whole, before = build().decode(prompt_ids + ids), build().decode(prompt_ids)
    joined_by_bytes = build in (llama_style, metaspace) and not whole.startswith(before)
    if not joined_by_bytes:
        assert "".join(texts) == whole[len(before) :]
    partial = steps(ours(build), prompt_ids, ids[:cut])
    assert partial[:-1] == texts[:cut], "a prefix of the tokens gives a prefix of the text"


@given(text=st.text())
def test_characters_are_never_shown_half(text: str) -> None:
    ids = byte_level().encode(text).ids
    texts = steps(ours(byte_level), [], ids)
    assert "".join(texts) == text
    assert sum(piece.count("\ufffd") for piece in texts) == text.count("\ufffd")


@pytest.mark.parametrize("build", [byte_level, llama_style, metaspace])
def test_an_emoji_of_four_tokens_comes_once(build: Build) -> None:
    tokenizer = ours(build)
    ids = [id_of(build, piece) for piece in _emoji_pieces(build)]
    assert steps(tokenizer, [], ids[:3])[:-1] == ["", "", ""]
    assert "".join(steps(tokenizer, [], ids)) == "😀"


def _emoji_pieces(build: Build) -> list[str]:
    if build is byte_level:
        return ["ð", "Ł", "ĺ", "Ģ"]
    return ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


@pytest.mark.parametrize("build", [llama_style, metaspace])
def test_the_space_after_the_prompt_stays(build: Build) -> None:
    prompt = build().encode("a").ids
    hello = id_of(build, "▁hello")
    assert "".join(steps(ours(build), prompt, [hello, hello])) == " hello hello"
    emoji = build().encode("a😀").ids
    assert "".join(steps(ours(build), emoji, [hello])) == " hello"


@pytest.mark.parametrize("build", [llama_style, metaspace])
def test_after_a_special_token_a_text_begins(build: Build) -> None:
    prompt = [*build().encode("a").ids, id_of(build, "</s>")]
    hello = id_of(build, "▁hello")
    assert "".join(steps(ours(build), prompt, [hello])) == "hello"


def test_special_tokens_have_no_text_and_added_ones_do() -> None:
    ids = [id_of(byte_level, piece) for piece in ("<s>", "h", "<|im_end|>", "<think> é", "i")]
    texts = steps(ours(byte_level), [], ids)
    assert texts == ["", "h", "", "<think> é", "i", ""]


def test_an_incomplete_end_is_flushed_as_decoded() -> None:
    ids = [id_of(byte_level, piece) for piece in ("h", "ð", "Ł")]
    assert steps(ours(byte_level), [], ids) == ["h", "", "", "\ufffd"]


@pytest.mark.parametrize("build", KINDS)
@given(data=st.data())
def test_token_bytes_make_the_text(build: Build, data: st.DataObject) -> None:
    tokenizer = ours(build)
    ids = data.draw(ids_of(build))
    ids = [i for i in ids if i not in tokenizer.special_ids]
    prompt = build().encode("a", add_special_tokens=False).ids
    joined = b"".join(tokenizer.pieces[i] for i in ids).decode("utf-8", "replace")
    if build in (byte_level, word_piece) or "\ufffd" not in joined:
        assert joined == "".join(steps(tokenizer, prompt, ids)) or build is word_piece


def test_token_text_names_special_tokens_and_keeps_spaces() -> None:
    assert ours(byte_level).token_text(id_of(byte_level, "</s>")) == "</s>"
    for build in (llama_style, metaspace):
        assert ours(build).token_text(id_of(build, "▁hello")) == " hello"
        assert ours(build).pieces[id_of(build, "<0xF0>")] == b"\xf0"
    assert ours(byte_level).token_text(10_000) == ""


async def test_encoding_ignores_the_files_truncation_and_padding() -> None:
    file = TokenizerFile.from_str(byte_level().to_str())
    file.enable_truncation(2)
    file.enable_padding(length=8)
    tokenizer = Tokenizer(file.to_str().encode(), 1)
    assert await tokenizer.encode("hello world") == byte_level().encode("hello world").ids


async def test_a_panic_of_the_library_is_an_error_of_its_request() -> None:
    """Here of a regular expression that gives up; a panic is no Exception."""
    file = json.loads(byte_level().to_str())
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    file["pre_tokenizer"] = split | {"pattern": {"Regex": "(?x:(?:q|q) +)[!?]"}}
    tokenizer = Tokenizer(json.dumps(file).encode(), 1)
    for call in (tokenizer.encode, tokenizer.spans):
        with pytest.raises(InvalidRequest, match="cannot encode this text"):
            await call("q" * 40)
    assert await tokenizer.encode("q") == byte_level().encode("q").ids


def test_a_panic_while_text_is_made_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    class Panicking:
        def decode(self, *_: object, **__: object) -> str:
            raise Panic("at the disco")

    tokenizer = Tokenizer(llama_style().to_str().encode(), 1)
    monkeypatch.setattr(tokenizer, "_file", Panicking())
    with pytest.raises(AdapterUnservable, match="cannot decode these tokens: at the disco"):
        tokenizer.detokenizer([]).step(id_of(llama_style, "▁hello"))
    with pytest.raises(AdapterUnservable):
        tokenizer.token_text(id_of(llama_style, "▁hello"))


async def test_spans_say_where_tokens_stand() -> None:
    text = "hello 🎉 world"
    spans = await ours(byte_level).spans(text)
    assert [span.id for span in spans] == byte_level().encode(text).ids
    assert "".join(dict.fromkeys(text[s.start : s.stop] for s in spans)) == text


def test_a_tokenizer_without_decoder_joins_with_spaces() -> None:
    file = TokenizerFile(models.WordLevel({"a": 0, "b": 1}))
    tokenizer = Tokenizer(file.to_str().encode(), 1)
    assert steps(tokenizer, [], [0, 1, 1]) == ["a", " b", " b", ""]
    assert json.loads(file.to_str())["decoder"] is None


def test_gemma_style_decoder_keeps_the_first_space() -> None:
    file = TokenizerFile.from_str(llama_style().to_str())
    file.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = Tokenizer(file.to_str().encode(), 1)
    assert "".join(steps(tokenizer, [], [id_of(llama_style, "▁hello")])) == " hello"
