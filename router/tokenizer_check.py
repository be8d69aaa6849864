"""What an adapter's tokenizer.json may have, so that its texts take time and memory as others do.

Whoever published the adapter wrote it, and the library does whatever it says, some of it with the
interpreter's lock held.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lorafleet.cache import tokenizer_files
from lorafleet.cache.errors import AdapterUnservable as AdapterFault
from lorafleet.cache.strict_json import read_object
from lorafleet.cache.tokenizer_files import TOKENIZER_FILE
from lorafleet.router.errors import AdapterUnservable

_MAX_REGEX_LENGTH = 2048
# A repeated group, one that is referred to or called, and whatever could hide one: flags such as
# verbose mode, comments, names.
_SLOW_REGEX = re.compile(r"\)[*+{]|\\[1-9kg]|\(\?(?!i?:|[=!]|<[=!])")

_WAYS = (("normalizer", "pre_tokenizer"), ("decoder",))  # of a text to tokens, and back
_POST = "post_processor"
_MAX_NODES = 16  # of a section; those of today's models have at most 8
_MAX_GROWTH = 8  # of a text by all nodes on its way
_MAX_ADDED = 16  # tokens or characters that are put beside every text, or every word, at one place
_MAX_TEXT = 128  # characters of what a model may put beside each character, such as a prefix
_MAX_POST_NODES = 256  # each token it puts beside a text counts
_MAX_WORD_LENGTH = 200  # which takes time by its square; BERT's is 100
_MAX_PIECE_LENGTH = 128  # which a model looks for at every character
# The library takes two hundred bytes of memory for each character of these, and holds the
# interpreter's lock while it does.
_MAX_VOCAB = 1 << 19
_MAX_PIECES_LENGTH = 2_000_000
_MAX_ADDED_LENGTH = 500_000
# Nodes that do not make a text longer each time. The others may double it.
_STEADY = frozenset(
    ("Sequence", "Prepend", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip",
     "StripAccents", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Metaspace",
     "BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts", "FixedLength", "ByteFallback",
     "Fuse")
)  # fmt: skip
_PATTERN_FIELDS = frozenset(("String", "Regex"))


def read_tokenizer_file(data: bytes) -> dict[str, Any]:
    """A tokenizer.json from outside. Raises AdapterUnservable."""
    try:
        tokenizer_files.check_values(TOKENIZER_FILE, data)
        return read_object(TOKENIZER_FILE, data)
    except AdapterFault as fault:
        raise AdapterUnservable(f"the adapter's tokenizer cannot be read: {fault}") from None


def check_tokenizer(file: dict[str, Any], base: dict[str, Any]) -> None:
    """Raises AdapterUnservable for what could take very long or very much; `base`: the base's.

    What the base model's file has as well is let through.
    """
    known = set(_regexes(base))
    for regex in set(_regexes(file)) - known:
        if len(regex) > _MAX_REGEX_LENGTH or _SLOW_REGEX.search(regex):
            raise AdapterUnservable(
                "the adapter's tokenizer.json has a regular expression that the base model's has "
                f"not and that could take very long: {regex[:120]!r}"
            )
    for names in _WAYS:
        if any(file.get(name) != base.get(name) for name in names):
            _check_way(names, file, base)
    if file.get(_POST) != base.get(_POST):
        _check_post_processor(file.get(_POST))
    if file.get("added_tokens") != base.get("added_tokens"):
        _check_added_tokens(file.get("added_tokens"))
    if file.get("model") != base.get("model"):
        _check_model(file.get("model"))


def _check_way(names: Sequence[str], file: dict[str, Any], base: dict[str, Any]) -> None:
    growth = math.prod(
        _check_section(name, file.get(name), list(_nodes(base.get(name)))) for name in names
    )
    if growth > _MAX_GROWTH:
        raise _refusal(
            f"{' and '.join(names)} could make a text many times as long: all nodes together may "
            f"make it {_MAX_GROWTH} times as long, and those that are not known here count as 2"
        )


def _check_section(name: str, section: Any, known: list[dict[str, Any]]) -> float:
    """How many times as long it may make a text. Raises AdapterUnservable."""
    nodes = [node for node in _nodes(section) if not node.keys() <= _PATTERN_FIELDS]
    if len(nodes) > _MAX_NODES:
        raise _refusal(f"{name} has {len(nodes)} nodes; it may have {_MAX_NODES}")
    for node in nodes:
        if node not in known:
            _check_node(name, node)
    return math.prod(map(_growth, nodes))


def _check_node(name: str, node: dict[str, Any]) -> None:
    if "precompiled_charsmap" in node:
        raise _refusal(f"{name} has a Precompiled node that the base model's has not")
    if len(str(node.get("prepend", ""))) > _MAX_ADDED:
        raise _refusal(f"{name} prepends more than {_MAX_ADDED} characters")
    if _is_replace(node) and _replaced(node) and _growth(node) > 1:
        raise _refusal(
            f"{name} has a Replace node whose content is longer than its pattern "
            f"{_replaced(node)[:40]!r}, which the base model's has not"
        )


def _growth(node: dict[str, Any]) -> float:
    """How many times as long a text may be behind a node."""
    if _is_replace(node):
        # What a regular expression matches may be nothing at all, between any two characters.
        text, length = _replaced(node), len(str(node["content"]))
        return max(1.0, length / len(text)) if text else 1.0 + length
    return 1.0 if node.get("type") in _STEADY else 2.0


def _replaced(node: dict[str, Any]) -> str:
    """The text that a Replace node replaces; empty where it is a regular expression."""
    pattern = node["pattern"]
    text = pattern.get("String") if isinstance(pattern, dict) else pattern
    return text if isinstance(text, str) else ""


def _is_replace(node: dict[str, Any]) -> bool:
    """Whether it is one by its fields: the library does without the type."""
    return "pattern" in node and "content" in node


def _check_post_processor(section: Any) -> None:
    nodes = list(_nodes(section))
    if len(nodes) > _MAX_POST_NODES:
        raise _refusal(f"{_POST} has {len(nodes)} nodes; it may have {_MAX_POST_NODES}")
    lists = (value for node in nodes for value in node.values())
    if any(isinstance(value, list) and len(value) > _MAX_ADDED for value in lists):
        raise _refusal(f"{_POST} adds more than {_MAX_ADDED} tokens at one place")


def _check_model(model: Any) -> None:
    if not isinstance(model, dict):
        return
    length = model.get("max_input_chars_per_word", 0)
    if not isinstance(length, int) or length > _MAX_WORD_LENGTH:
        raise _refusal(
            f"model has max_input_chars_per_word {str(length)[:40]}; it may be {_MAX_WORD_LENGTH}"
        )
    for name, value in model.items():
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise _refusal(f"model has a {name[:40]!r} of more than {_MAX_TEXT} characters")
    _check_vocabulary(model.get("vocab"))


def _check_vocabulary(vocab: Any) -> None:
    if not isinstance(vocab, dict | list):
        return
    if len(vocab) > _MAX_VOCAB:
        raise _refusal(f"model.vocab has {len(vocab)} entries; it may have {_MAX_VOCAB}")
    entries = vocab if isinstance(vocab, list) else []  # of a Unigram model
    lengths = [len(str(entry[0])) for entry in entries if isinstance(entry, list) and entry]
    if max(lengths, default=0) > _MAX_PIECE_LENGTH:
        raise _refusal(f"model.vocab has a piece of more than {_MAX_PIECE_LENGTH} characters")
    if sum(lengths) > _MAX_PIECES_LENGTH:
        raise _refusal(f"model.vocab has pieces of more than {_MAX_PIECES_LENGTH} characters")


def _check_added_tokens(tokens: Any) -> None:
    entries = tokens if isinstance(tokens, list) else []
    texts = (str(entry.get("content", "")) for entry in entries if isinstance(entry, dict))
    if sum(map(len, texts)) > _MAX_ADDED_LENGTH:
        raise _refusal(f"added_tokens have more than {_MAX_ADDED_LENGTH} characters together")


def _refusal(reason: str) -> AdapterUnservable:
    return AdapterUnservable(f"the adapter's tokenizer.json is not served: its {reason}")


def _regexes(node: Any) -> Iterator[str]:
    """Every regular expression of a tokenizer's file, however it nests."""
    for found in _nodes(node):
        if isinstance(regex := found.get("Regex"), str):
            yield regex


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every object of a tokenizer's file, however it nests, but for vocabularies and merges."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield node
            stack += [value for name, value in node.items() if name not in ("vocab", "merges")]
        elif isinstance(node, list):
            stack += node
