"""What an adapter's tokenizer.json may not have, and that those of today's models pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as TokenizerFile

from lorafleet.router.errors import AdapterUnservable
from lorafleet.router.prompt_form import open_tokenizer
from lorafleet.router.tokenizer_check import check_tokenizer, read_tokenizer_file
from tests.router.tokenizers_for_tests import byte_level, llama_style, metaspace, word_piece

MODELS = ("Llama", "CodeLlama", "Gemma", "Qwen2", "GPT2", "GPTNeoX", "Cohere", "Bert", "Albert")
BASE = json.loads(byte_level().to_str())
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LIKE_LLAMA_3 = {
    "type": "Split",
    "behavior": "Isolated",
    "invert": False,
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
}


def replaced(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def split(regex: str) -> dict[str, Any]:
    return LIKE_LLAMA_3 | {"pattern": {"Regex": regex}}


def several(name: str, nodes: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: nodes}


def check(base: dict[str, Any] = BASE, **changes: Any) -> None:
    check_tokenizer(BASE | changes, base)


@pytest.mark.parametrize("model", MODELS)
def test_those_of_todays_models_pass(model: str) -> None:
    made = getattr(transformers, f"{model}Tokenizer")()
    file = made._tokenizer.to_str().encode()
    check_tokenizer(read_tokenizer_file(file), BASE)


@pytest.mark.parametrize("build", [byte_level, llama_style, metaspace, word_piece])
def test_those_of_each_kind_are_opened(build: Any) -> None:
    open_tokenizer(build().to_str().encode(), json.dumps(BASE).encode(), 1).close()


@pytest.mark.parametrize(
    ("section", "node", "said"),
    [
        ("normalizer", DOUBLE, "Replace node whose content is longer than its pattern 'a'"),
        ("decoder", several("decoders", [DOUBLE] * 2), "Replace node"),
        ("normalizer", {"pattern": {"String": "a"}, "content": "aa"}, "Replace node"),
        ("normalizer", replaced(" ", "\u2581") | {"pattern": {"Regex": " "}, "content": "a" * 70},
         "many times"),
        ("normalizer", several("normalizers", [{"type": "ByteLevel"}] * 4), "many times"),
        ("pre_tokenizer", several("pretokenizers", [{"type": "ByteLevel"}] * 4), "many times"),
        ("pre_tokenizer", several("pretokenizers", [{"add_prefix_space": True}] * 4), "many times"),
        ("decoder", several("decoders", [{"type": "BPEDecoder", "suffix": ""}] * 4), "many times"),
        ("normalizer", several("normalizers", [{"type": "NFC"}] * 17), "18 nodes; it may have 16"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "Precompiled"),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 99}, "prepends more than 16"),
        ("post_processor", {"type": "TemplateProcessing", "single": [{}] * 99}, "more than 16"),
        ("post_processor", several("processors", [{"a": {"b": {}}}] * 99), "298 nodes"),
        ("model", {"type": "WordPiece", "max_input_chars_per_word": 201}, "it may be 200"),
        ("model", {"type": "BPE", "continuing_subword_prefix": "a" * 999}, "continuing_subword_pr"),
        ("model", {"type": "Unigram", "vocab": [["a" * 9999, 0.0]]}, "piece of more than 128"),
        ("model", {"type": "Unigram", "vocab": [["a" * 128, 0.0]] * 16_000}, "pieces of more than"),
        ("model", {"type": "BPE", "vocab": dict.fromkeys(range(600_000))}, "600000 entries"),
        ("added_tokens", [{"id": 300, "content": "a" * 1000}] * 501, "more than 500000 characters"),
        ("pre_tokenizer", split("(?x:(?:q|q) +)[!?]"), "could take very long"),
        ("pre_tokenizer", split("(?x)(?:q|q) +[!?]"), "could take very long"),
        ("pre_tokenizer", split("(?:q|q)(?#)+[!?]"), "could take very long"),
        ("pre_tokenizer", split(r"(q\g<1>?q?)[!?]"), "could take very long"),
        ("pre_tokenizer", split("(?<n>q)"), "could take very long"),
    ],
)  # fmt: skip
def test_what_takes_long_is_refused_by_name(section: str, node: Any, said: str) -> None:
    with pytest.raises(AdapterUnservable, match=f"tokenizer.json .*{said}"):
        check(**{section: node})


@pytest.mark.parametrize(
    ("section", "node"),
    [
        ("normalizer", several("normalizers", [{"type": "Prepend", "prepend": "\u2581"},
                                               replaced(" ", "\u2581")])),
        ("decoder", several("decoders", [replaced("\u2581", " "), {"type": "ByteFallback"},
                                         {"type": "Fuse"}, {"type": "Strip"}])),
        ("pre_tokenizer", several("pretokenizers", [LIKE_LLAMA_3, {"type": "ByteLevel"}])),
        ("model", {"type": "WordPiece", "max_input_chars_per_word": 100}),
    ],
)  # fmt: skip
def test_what_models_have_passes(section: str, node: Any) -> None:
    check(**{section: node})


def test_what_two_sections_do_to_a_text_is_one() -> None:
    nodes = [{"type": "ByteLevel"}] * 2
    check(normalizer=several("normalizers", nodes))
    with pytest.raises(AdapterUnservable, match="normalizer and pre_tokenizer could make"):
        check(
            normalizer=several("normalizers", nodes),
            pre_tokenizer=several("pretokenizers", nodes),
        )


def test_what_the_base_model_has_passes_once() -> None:
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    for node in (DOUBLE, charsmap):
        base = BASE | {"normalizer": node}
        check(base, normalizer=several("normalizers", [node, {"type": "NFC"}]))
        with pytest.raises(AdapterUnservable, match="many times"):
            check(base, normalizer=several("normalizers", [node] * 4))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"x": [' + b"[]," * 200_000 + b"[]]}", "200003 lists and objects"),
        (b'{"x": [' + b'"abcdefg",' * 3_000_000 + b"1]}", "values; it may have 3000000"),
        (b'{"decoder": null, "decoder": {}}', "'decoder' twice"),
    ],
)
def test_what_is_not_to_be_parsed_is_not(data: bytes, said: str) -> None:
    with pytest.raises(AdapterUnservable, match=said):
        open_tokenizer(data, b"{}", 1)


def test_a_tokenizer_of_many_merges_is_read() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c for a in letters for b in letters for c in letters]
    merges = [[word[:cut], word[cut:]] for word in words for cut in (1, 2)]
    vocab = {word: number for number, word in enumerate(words)}
    file = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    assert read_tokenizer_file(json.dumps(file).encode()) == file


def test_the_double_is_one() -> None:
    file = TokenizerFile.from_str(json.dumps(BASE | {"normalizer": DOUBLE}))
    assert len(file.encode("aaa", add_special_tokens=False).offsets) > 3
