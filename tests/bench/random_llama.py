"""A random Llama, of 34 million parameters unless told, and eight adapters, as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 8192
NUM_ADAPTERS = 8
RANK = 8


def write(folder: Path, hidden_size: int = 512, num_layers: int = 8) -> None:
    """Writes `folder`/model and `folder`/adapters/a0 .. a7 (rank 8, every linear layer)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(hidden_size, num_layers))
    model.save_pretrained(folder / "model")
    _tokenizer().save(str(folder / "model" / "tokenizer.json"))
    for number in range(NUM_ADAPTERS):
        # init_lora_weights=False leaves B random, so that every adapter changes the answer.
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False
        )
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder / "adapters" / f"a{number}", save_embedding_layers=False)
        model = adapted.unload()


def _config(hidden_size: int, num_layers: int) -> LlamaConfig:
    """Weights spread wide (initializer_range), so that the best next token wins clearly."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )


def _tokenizer() -> Tokenizer:
    """Token i is the word `wi`, so text and ids say the same."""
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
