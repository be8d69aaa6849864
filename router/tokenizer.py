"""Text to tokens in threads, tokens to text as they come; on the `tokenizers` library alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from tokenizers import Tokenizer as TokenizerFile

from lorafleet.router.detokenizer import Detokenizer, Utf8Detokenizer, WindowDetokenizer
from lorafleet.router.errors import AdapterUnservable, InvalidRequest

R = TypeVar("R")

_MAX_CACHED_WINDOWS = 1 << 15


class Span(NamedTuple):
    """A token and the characters [start, stop) of the input it stands for."""

    id: int
    start: int
    stop: int


class Tokenizer:
    """The tokenizer of the base model, or of an adapter that has its own.

    `special_ids` have no text in what is generated. Encoding has threads of its own, since a long
    prompt takes tens of milliseconds; decoding a token takes microseconds and needs none.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        threads: int | ThreadPoolExecutor,
        max_characters: int | None = None,
    ) -> None:
        """`threads`: how many it has, or those it shares with others.

        `max_characters`: of a text that is encoded, which somebody else's tokenizer may take long
        over however few tokens it makes of it; None = any.
        """
        self._max_characters = max_characters
        self._file = TokenizerFile.from_str(tokenizer_json.decode())
        self._file.no_truncation()
        self._file.no_padding()
        if isinstance(threads, int):
            threads = ThreadPoolExecutor(threads, "tokenizer")
        self._threads = threads
        added = self._file.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        # A model's logits may be wider than its tokenizer: ids without a token have no text either.
        self._text_ids = frozenset(self._file.get_vocab().values()) - self.special_ids
        decoder = _decoder(self._file)
        self._byte_ids = _byte_ids(self._file) if _has_byte_fallback(decoder) else {}
        self._byte_level = decoder.get("type") == "ByteLevel"
        self.pieces = _Pieces(self._byte_level_piece if self._byte_level else self._decoded_piece)
        self._filler = self._find_filler()
        # Windows are a token or two, so the same ones come again and again.
        self._decode_window = lru_cache(_MAX_CACHED_WINDOWS)(self.decode)

    async def encode(
        self, text: str, *, field: str = "text", add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of `text`, with the tokenizer's own special tokens around it if asked.

        Raises InvalidRequest, naming `field`, where it is too long, or has no tokens.
        """
        limit = self._max_characters
        if limit is not None and len(text) > limit:
            raise InvalidRequest(
                f"`{field}` must have at most {limit} characters for an adapter that has its own "
                f"tokenizer, got {len(text)}",
                field,
            )
        return await self.in_thread(self._encode, text, add_special_tokens)

    async def spans(self, text: str, *, add_special_tokens: bool = True) -> list[Span]:
        """Token ids of `text` and where each stands in it. Raises InvalidRequest as `encode`."""
        return await self.in_thread(self._spans, text, add_special_tokens)

    async def in_thread(self, call: Callable[..., R], *args: Any) -> R:
        """Runs what may take long in one of the tokenizer's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written so, None if there is none."""
        found: int | None = self._file.token_to_id(text)
        return found

    def token_text(self, token_id: int) -> str:
        """A token's own text, inside a sentence; U+FFFD where it holds part of a character."""
        return self.pieces[token_id].decode("utf-8", "replace")

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A detokenizer for what follows a prompt."""
        if self._byte_level:
            return Utf8Detokenizer(self.pieces, self._text_ids)
        # After a special token a new text begins; after any other, the prompt's text goes on.
        continues = bool(prompt_ids) and prompt_ids[-1] not in self.special_ids
        before = self._filler if continues else []
        return WindowDetokenizer(self._decode_window, before, self._text_ids, self._byte_ids)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # encode_batch_fast lets other threads run; encode does not.
        encoding = self._encoding(self._file.encode_batch_fast, text, add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _spans(self, text: str, add_special_tokens: bool) -> list[Span]:
        encoding = self._encoding(self._file.encode_batch, text, add_special_tokens)
        return [
            Span(id, *offsets) for id, offsets in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _encoding(self, batch: Callable[..., Any], text: str, add_special_tokens: bool) -> Any:
        try:
            [encoding] = batch([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            _raise_unless_the_librarys(error)
            reason = f"the tokenizer cannot encode this text: {str(error)[:200]}"
            raise InvalidRequest(reason) from None
        return encoding

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out. Raises AdapterUnservable if there is none."""
        return self._decode(ids, skip_special_tokens=True)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        try:
            text: str = self._file.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            _raise_unless_the_librarys(error)
            reason = f"the tokenizer cannot decode these tokens: {str(error)[:200]}"
            raise AdapterUnservable(reason) from None
        return text

    def _find_filler(self) -> list[int]:
        """A token that stands for whatever text comes before another token."""
        ids = self._encode("a", False)
        return [token_id for token_id in ids if token_id not in self.special_ids][:1]

    def _byte_level_piece(self, token_id: int) -> bytes:
        piece = self._file.id_to_token(token_id) or ""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
        except KeyError:  # an added token: its own text
            return piece.encode()

    def _decoded_piece(self, token_id: int) -> bytes:
        if token_id in self._byte_ids:
            return bytes([self._byte_ids[token_id]])
        before = self.decode(self._filler)
        text = self._decode([*self._filler, token_id], skip_special_tokens=False)
        return text[len(before) :].encode()


def _raise_unless_the_librarys(error: BaseException) -> None:
    """The library has no type of its own, and its panics are no Exceptions: all others go on."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | asyncio.CancelledError):
        raise error


class _Pieces(dict[int, bytes]):
    """Each token's bytes, worked out at first use; at most one entry per vocabulary id."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = found = self._piece(token_id)
        return found


def _decoder(file: TokenizerFile) -> dict[str, Any]:
    """The decoder as the file has it, which is not parsed again for it: that takes long."""
    found: dict[str, Any] = json.loads(file.decoder.__getstate__()) if file.decoder else {}
    return found


def _has_byte_fallback(decoder: Any) -> bool:
    if not decoder:
        return False
    return decoder["type"] == "ByteFallback" or any(
        map(_has_byte_fallback, decoder.get("decoders", ()))
    )


def _byte_ids(file: TokenizerFile) -> dict[int, int]:
    """Token id of `<0xNN>` -> the byte NN."""
    ids = ((file.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {token_id: byte for token_id, byte in ids if token_id is not None}


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the others as U+0100, U+0101, ..."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _byte_of_character()
