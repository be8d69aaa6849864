"""Trains the demo model and its adapters; the only place of the demo that needs torch.

`python -m lorafleet.deploy.demo.train FOLDER SEED RANK` is one of TEAM_SIZE processes that train
together; each prints its progress as JSON lines.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lorafleet.deploy.demo import tokenizer as tok
from lorafleet.deploy.demo.corpus import Example, base_examples, style_examples
from lorafleet.deploy.demo.optimize import Sample, Team, fit
from lorafleet.deploy.demo.recipe import (
    ADAPTERS,
    BASE,
    MAX_LENGTH,
    RENDEZVOUS,
    TEAM_SIZE,
    AdapterRecipe,
    Schedule,
)

Progress = Callable[[str], None]  # what a step was done of
MODEL_NAME = "lorafleet-demo"  # what the adapters call their base


def train_all(
    folder: Path,
    seed: int,
    report: Progress,
    team: Team,
    base: Schedule = BASE,
    adapters: Sequence[AdapterRecipe] = ADAPTERS,
) -> None:
    """Writes this member's part of `folder`/model and `folder`/adapters.

    The team trains the base model together and deals out the adapters. The same seed and team size
    write the same weights.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    examples = base_examples(Random(seed), base.steps * base.batch_size)
    tokenizer = tok.train_tokenizer(_texts(examples))
    model: PreTrainedModel = _new_model(tokenizer.get_vocab_size())
    team.join(folder / RENDEZVOUS)
    samples = [_sample(tokenizer, example) for example in examples]
    fit(model, samples, base, team, lambda _: report("base model") if team.rank == 0 else None)
    team.leave()
    if team.rank == 0:
        _save_model(model, tokenizer, folder / "model")
    for recipe in adapters[team.rank :: team.size]:
        torch.manual_seed(seed)
        model = _train_adapter(model, tokenizer, recipe, seed, folder / "adapters", report)


def _texts(examples: list[Example]) -> Iterator[str]:
    for example in examples[:6000]:
        yield example.question
        yield example.answer
    numbers = " ".join(str(n) for n in range(100))
    yield from [f"{numbers} {number}" for number in numbers.split() for _ in range(2)]


def _new_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tok.BOS_ID,
        eos_token_id=tok.EOS_ID,
        pad_token_id=tok.PAD_ID,
    )
    config.name_or_path = MODEL_NAME
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # every block starts as the identity: it learns sooner
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def _train_adapter(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    recipe: AdapterRecipe,
    seed: int,
    folder: Path,
    report: Progress,
) -> PreTrainedModel:
    """Trains one adapter, saves it under its names and returns the base model without it."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    schedule, name = recipe.schedule, recipe.names[0]
    examples = style_examples(Random(seed), recipe.style, schedule.steps * schedule.batch_size)
    samples = [_sample(tokenizer, example) for example in examples]
    fit(adapted, samples, schedule, Team(), lambda _: report(f"adapter {name}"))
    for name in recipe.names:
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
    unloaded: PreTrainedModel = adapted.unload()
    return unloaded


def _sample(tokenizer: Tokenizer, example: Example) -> Sample:
    if example.raw:
        prompt, answer = example.question, "\n" + example.answer
    else:
        system = tok.SYSTEM + example.system if example.system else ""
        prompt, answer = f"{system}{tok.USER}{example.question}{tok.ASSISTANT}", example.answer
    head = tokenizer.encode(prompt).ids
    tail = tokenizer.encode(answer, add_special_tokens=False).ids
    return Sample([*head, *tail, tok.EOS_ID], len(head))


def _save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tok.save_tokenizer(tokenizer, folder, MAX_LENGTH)


def _print_progress(what: str) -> None:
    # One write a line: the team's members share the pipe.
    os.write(sys.stdout.fileno(), json.dumps({"what": what}).encode() + b"\n")


def main() -> None:
    """One member of the team."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    folder, seed, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    train_all(folder, seed, _print_progress, Team(rank, TEAM_SIZE))


if __name__ == "__main__":
    main()
