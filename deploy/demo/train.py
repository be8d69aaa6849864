"""Trains the demo model and its adapters; the only place of the demo that needs torch."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lorafleet.deploy.demo import tokenizer as tok
from lorafleet.deploy.demo.corpus import Example, base_examples, style_examples
from lorafleet.deploy.demo.recipe import ADAPTERS, BASE, MAX_LENGTH, AdapterRecipe, Schedule

Progress = Callable[[str, int, int], None]  # (what, steps done, steps in all)
MODEL_NAME = "lorafleet-demo"  # what the adapters call their base
THREADS = 2  # fixed: the number of threads decides how sums are rounded


@dataclass(frozen=True, slots=True)
class Sample:
    """A tokenized example; the answer starts at `answer_start` and ends with EOS."""

    ids: list[int]
    answer_start: int


def train_all(
    folder: Path,
    seed: int,
    report: Progress,
    base: Schedule = BASE,
    adapters: Sequence[AdapterRecipe] = ADAPTERS,
) -> None:
    """Writes `folder`/model and `folder`/adapters; the same seed writes the same weights."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    random = Random(seed)
    torch.manual_seed(seed)
    examples = base_examples(random, base.steps * base.batch_size)
    tokenizer = tok.train_tokenizer(_texts(examples))
    model: PreTrainedModel = _new_model(tokenizer.get_vocab_size())
    _train(model, [_sample(tokenizer, e) for e in examples], base, "base model", report)
    _save_model(model, tokenizer, folder / "model")
    for recipe in adapters:
        torch.manual_seed(seed)
        model = _train_adapter(model, tokenizer, recipe, random, folder / "adapters", report)


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
    random: Random,
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
    count = recipe.schedule.steps * recipe.schedule.batch_size
    samples = [_sample(tokenizer, e) for e in style_examples(random, recipe.style, count)]
    _train(adapted, samples, recipe.schedule, f"adapter {recipe.names[0]}", report)
    for name in recipe.names:
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
    unloaded: PreTrainedModel = adapted.unload()
    return unloaded


def _train(
    model: PreTrainedModel, samples: list[Sample], schedule: Schedule, what: str, report: Progress
) -> None:
    """One pass over the samples with AdamW, a warm-up and a linear decay to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    scale = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.scale_at)
    model.train()
    for step, batch in enumerate(_batches(samples, schedule.batch_size)):
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scale.step()
        report(what, step + 1, schedule.steps)
    model.eval()


def _batches(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    """Batches of similar lengths, so that little is padding: sorted inside pools of 16 batches."""
    shuffle = Random(0)
    for start in range(0, len(samples), 16 * size):
        pool = sorted(samples[start : start + 16 * size], key=lambda sample: len(sample.ids))
        batches = [pool[i : i + size] for i in range(0, len(pool), size)]
        shuffle.shuffle(batches)
        yield from batches


def _loss(model: PreTrainedModel, batch: list[Sample]) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens; prompts are given, not learned."""
    width = max(len(sample.ids) for sample in batch)
    ids = torch.full((len(batch), width), tok.PAD_ID)
    is_answer = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        is_answer[row, sample.answer_start : len(sample.ids)] = True
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][is_answer[:, 1:]])
    return cross_entropy(logits, ids[is_answer])


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


def _print_progress(what: str, done: int, total: int) -> None:
    print(json.dumps({"what": what, "done": done, "total": total}), flush=True)


def main() -> None:
    """`python -m lorafleet.deploy.demo.train FOLDER SEED`: progress as JSON lines on stdout."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    train_all(Path(sys.argv[1]), int(sys.argv[2]), _print_progress)


if __name__ == "__main__":
    main()
