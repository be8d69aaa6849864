"""A byte-level tokenizer in the `tokenizers` file format for fake shards.

Ids: 0 <pad>, 1 <s>, 2 </s>, 3..97 printable ASCII in order, 98..258 the other bytes. One token per
UTF-8 byte, so a character may span tokens.
"""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 259
_SPECIAL = ("<pad>", "<s>", "</s>")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer_json() -> bytes:
    """The tokenizer file."""
    printable = [*range(0x20, 0x7F)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    names = [*_SPECIAL, *(_byte_name(byte) for byte in order)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    return tokenizer.to_str().encode()


def tokenizer_config_json() -> bytes:
    """Special tokens and a chat template."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return json.dumps(config | {"chat_template": _TEMPLATE}).encode()


def _byte_name(byte: int) -> str:
    """The printable character byte-level BPE writes for a byte."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in kept:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in kept].index(byte))
