"""A random Llama, of 34 million parameters unless told, and eight adapters, as folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 8192
NUM_ADAPTERS = 8
RANK = 8
HIDDEN, INTERMEDIATE = 512, 1536
_FEATURES = {  # module: its inputs and outputs
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}


def write(
    folder: Path,
    hidden_size: int = HIDDEN,
    layers: int = 8,
    num_adapters: int = NUM_ADAPTERS,
    positions: int = 1024,
) -> None:
    """Writes `folder`/model and `folder`/adapters/a0 .. a7 (rank 8, every linear layer)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(hidden_size, layers, positions))
    model.save_pretrained(folder / "model")
    _tokenizer().save(str(folder / "model" / "tokenizer.json"))
    for number in range(num_adapters):
        # init_lora_weights=False leaves B random, so that every adapter changes the answer.
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False
        )
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder / "adapters" / f"a{number}", save_embedding_layers=False)
        model = adapted.unload()


def write_adapter(folder: Path, rank: int, layers: int = 8) -> None:
    """Another adapter for it, on every linear layer."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(layers):
        for module, (wide, out) in _FEATURES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, wide) / math.sqrt(wide)
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank) / rank
    save_file(tensors, folder / "adapter_model.safetensors")


def _config(hidden_size: int, layers: int, positions: int) -> LlamaConfig:
    """Weights spread wide (initializer_range), so that the best next token wins clearly."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )


def _tokenizer() -> Tokenizer:
    """Token i is the word `wi`, so text and ids say the same."""
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
