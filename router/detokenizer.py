"""Tokens to text, one token at a time, exactly as the tokenizer would decode them all at once.

A character that is not complete yet is held, never shown as U+FFFD. Only `text_ids` have text:
special tokens and ids without a token have none.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Mapping
from typing import Protocol

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """The text of a growing token sequence."""

    def step(self, token_id: int) -> str:
        """The text this token completes; "" when it completes none."""

    def flush(self) -> str:
        """What was held, as the full decode ends; the sequence is over."""


class Utf8Detokenizer:
    """For byte-level tokenizers, whose tokens are byte strings: text is their UTF-8 decoding."""

    def __init__(self, pieces: Mapping[int, bytes], text_ids: Container[int]) -> None:
        self._pieces = pieces
        self._text_ids = text_ids
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def step(self, token_id: int) -> str:
        """The characters this token's bytes complete."""
        return self._decode(self._pieces[token_id]) if token_id in self._text_ids else ""

    def flush(self) -> str:
        """U+FFFD if the last character is incomplete."""
        return self._decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: decodes the tokens behind the last piece of text with the new one.

    `before` stands for the prompt, so that a decoder that strips the first space of a text does not
    strip the space between prompt and completion; empty when no text comes before. Consecutive byte
    tokens (`<0xF0>`) are decoded together by their decoder, valid or not as a whole, so their text
    waits for the token that ends the run.
    """

    def __init__(
        self,
        decode: Callable[[tuple[int, ...]], str],
        before: list[int],
        text_ids: Container[int],
        byte_ids: Container[int],
    ) -> None:
        self._decode = decode
        self._text_ids = text_ids
        self._byte_ids = byte_ids
        self._window = list(before)
        self._num_shown = len(self._window)  # tokens of the window whose text is out
        self._shown = decode(tuple(before))

    def step(self, token_id: int) -> str:
        """The text this token completes."""
        if token_id not in self._text_ids:
            return ""
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return ""
        text = self._decode(tuple(self._window))
        return "" if text.endswith(REPLACEMENT) else self._advance(text)

    def flush(self) -> str:
        """Everything held."""
        return self._advance(self._decode(tuple(self._window)))

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            del self._window[: self._num_shown]
            self._num_shown = len(self._window)
            self._shown = self._decode(tuple(self._window))
        return new
