"""The training loop: batches, the answers' loss, gradients that a team adds up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lorafleet.deploy.demo.recipe import Schedule
from lorafleet.deploy.demo.tokenizer import PAD_ID

POOL_BATCHES = 16  # batches are cut from so many at a time, sorted by length


@dataclass(frozen=True, slots=True)
class Sample:
    """A tokenized example; the answer starts at `answer_start` and ends with EOS."""

    ids: list[int]
    answer_start: int


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that train together, one thread each.

    Two single-threaded processes lose far less on a busy machine than two OpenMP threads, which
    meet at a barrier in every layer.
    """

    rank: int = 0
    size: int = 1

    def join(self, rendezvous: Path) -> None:
        """Meets the other processes at a file that none of them has made before."""
        if self.size > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            method = f"file://{rendezvous.resolve()}"
            dist.init_process_group("gloo", method, rank=self.rank, world_size=self.size)

    def leave(self) -> None:
        """Ends the meeting."""
        if self.size > 1:
            dist.destroy_process_group()

    def sum_(self, x: torch.Tensor) -> None:
        """Adds up `x` over the team, in place."""
        if self.size > 1:
            dist.all_reduce(x)


def fit(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    schedule: Schedule,
    team: Team,
    report: Callable[[int], None],
) -> None:
    """One pass over the samples with AdamW, a warm-up and a linear decay to zero.

    Every member of the team ends with the same weights. Calls `report` with the steps done.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = _flat_gradient(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    scale = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.scale_at)
    model.train()
    for step, batch in enumerate(_batches(samples, schedule.batch_size), start=1):
        gradient.zero_()
        _loss(model, batch, team).backward()
        team.sum_(gradient)
        gradient.mul_((1.0 / gradient.norm()).clamp(max=1.0))  # no longer than 1
        optimizer.step()
        scale.step()
        report(step)
    model.eval()


def _flat_gradient(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """One vector that holds all gradients, so that a team sums them in one call."""
    flat = torch.zeros(sum(p.numel() for p in parameters))
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Batches of similar lengths, so that little is padding."""
    shuffle = Random(0)
    for start in range(0, len(samples), POOL_BATCHES * size):
        pool = samples[start : start + POOL_BATCHES * size]
        pool = sorted(pool, key=lambda sample: len(sample.ids))
        batches = [pool[i : i + size] for i in range(0, len(pool), size)]
        shuffle.shuffle(batches)
        yield from batches


def _loss(model: PreTrainedModel, batch: list[Sample], team: Team) -> torch.Tensor:
    """This member's part of the mean cross-entropy over the answers' tokens; prompts are given."""
    num_answer_tokens = sum(len(sample.ids) - sample.answer_start for sample in batch)
    mine = batch[team.rank :: team.size]
    width = max(len(sample.ids) for sample in mine)
    ids = torch.full((len(mine), width), PAD_ID)
    is_answer = torch.zeros(len(mine), width, dtype=torch.bool)
    for row, sample in enumerate(mine):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        is_answer[row, sample.answer_start : len(sample.ids)] = True
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][is_answer[:, 1:]])
    return cross_entropy(logits, ids[is_answer], reduction="sum") / num_answer_tokens
