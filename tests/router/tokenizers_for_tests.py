"""Tokenizers of the kinds checkpoints have, small enough to build in a test."""

from __future__ import annotations

from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

_TEXT = [
    "hello world, this is a text",
    "the  quick brown fox's tail",
    "größe naïve 日本語 🎉🎉 привет",
]
SPECIAL = ("<s>", "</s>", "<|im_end|>")


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE with special tokens and an added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    tokenizer.add_tokens([AddedToken("<think> é", special=False)])
    return tokenizer


def _byte_fallback_model() -> models.BPE:
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += list("▁abcdefghijklmnopqrstuvwxyzé.,")
    merges = [
        ("▁", "h"),
        ("e", "l"),
        ("▁h", "el"),
        ("l", "o"),
        ("▁hel", "lo"),
        ("▁", "▁"),
        ("▁▁", "▁▁"),
        ("▁", "t"),
    ]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


@cache
def llama_style() -> Tokenizer:
    """SentencePiece BPE as Llama 2 and Mistral store it."""
    tokenizer = Tokenizer(_byte_fallback_model())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """SentencePiece with the Metaspace decoder."""
    tokenizer = Tokenizer(_byte_fallback_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    """WordPiece, whose decoder puts the spaces in."""
    pieces = ["[UNK]", *SPECIAL, "hello", "world", "##s", "##ing", "good", "!", ","]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer
