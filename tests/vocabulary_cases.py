"""Adapters that change the vocabulary, each made and answered by peft."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.fake_tokenizer import VOCAB_SIZE

TOKENS = [3, 77, 250]  # in the halves of both ranks


@dataclass(frozen=True)
class Case:
    """How peft makes an adapter: `num_tokens` is what the model is resized to first."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = VOCAB_SIZE
    has_all_logits: bool = True  # whether the files say what the head gives for added tokens


def _lora(*targets: str, **options: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", *targets], **options}


_BOTH = ["embed_tokens", "lm_head"]
_EACH = {"embed_tokens": TOKENS, "lm_head": TOKENS}
_DIFFERENT = {"embed_tokens": TOKENS, "lm_head": [5, 200]}

CASES = (
    Case("lora-embedding", _lora("embed_tokens")),
    Case("lora-head", _lora("lm_head")),
    Case("lora-both", _lora(*_BOTH)),
    Case("lora-only-embedding", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    Case("lora-pattern", _lora(*_BOTH, rank_pattern={"lm_head": 2, "embed_tokens": 5})),
    Case("lora-both-tied", _lora(*_BOTH, ensure_weight_tying=True)),
    Case("lora-head-tied", _lora("lm_head", ensure_weight_tying=True)),
    Case("saved-embedding", _lora(modules_to_save=["embed_tokens"])),
    Case("saved-head", _lora(modules_to_save=["lm_head"])),
    Case("saved-both", _lora(modules_to_save=_BOTH)),
    Case("saved-both-tied", _lora(modules_to_save=_BOTH, ensure_weight_tying=True)),
    Case("saved-and-lora", _lora("embed_tokens", modules_to_save=["lm_head"])),
    Case("tokens", _lora(trainable_token_indices=TOKENS)),
    Case("tokens-each", _lora(trainable_token_indices=_EACH)),
    Case("tokens-different", _lora(trainable_token_indices=_DIFFERENT)),
    Case("tokens-head-only", _lora(trainable_token_indices={"lm_head": TOKENS})),
    Case("tokens-and-lora", _lora("lm_head", trainable_token_indices=TOKENS)),
    Case("resized", _lora(), 264),
    Case("resized-saved", _lora(modules_to_save=_BOTH), 270),
    Case("resized-lora", _lora(*_BOTH), 264),
    Case("resized-embedding", _lora("embed_tokens"), 262, has_all_logits=False),
    Case("resized-tokens", _lora(trainable_token_indices=[3, 260, 259]), 261),
    Case("smaller", _lora(), 250),
)  # fmt: skip


def make_case(case: Case, model: Path, directory: Path) -> None:
    """Writes the adapter's folder; every weight that peft trains gets noise."""
    torch.manual_seed(sum(case.name.encode()))
    base = _base(model, case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what ties and what is saved: these are the cases
        peft = get_peft_model(
            base, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **case.options)
        )
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * 0.2
        peft.save_pretrained(directory)


def load_case(case: Case, model: Path, directory: Path) -> PeftModel:
    """The base with the adapter, as peft loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(_base(model, case), directory).eval()


def _base(model: Path, case: Case) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if case.num_tokens != VOCAB_SIZE:
        torch.manual_seed(1)
        base.resize_token_embeddings(case.num_tokens, mean_resizing=False)
        with torch.no_grad():  # so that the added tokens are drawn
            base.get_output_embeddings().weight[VOCAB_SIZE:] *= 4
    return base
