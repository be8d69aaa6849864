"""A base model's folder without weights, for `--load-format dummy`: config and a made tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.bench.gpu.shapes import Shape

_PRINTABLE = [chr(code) for code in range(0x20, 0x7F)]
_PIECE = re.compile(r" w(\d+)\.|(.)", re.DOTALL)


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Writes config.json and tokenizer.json.

    Token i is the character 0x20 + i up to `~`, beyond that the word ` wi.`, so that every token
    has text, a text names its tokens, and any ASCII text has tokens. There are no special ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape.config().save_pretrained(folder)
    words = [f" w{i}." for i in range(len(_PRINTABLE), shape.vocab_size)]
    pieces = [*_PRINTABLE, *words]
    # Byte-level vocabularies write a space as U+0120.
    vocabulary = {piece.replace(" ", "\u0120"): i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def token_ids(text: str) -> list[int]:
    """The tokens that a model with this tokenizer has generated."""
    return [
        int(word) if word else ord(character) - ord(_PRINTABLE[0])
        for word, character in _PIECE.findall(text)
    ]
