"""All ranks of a model in one process, a thread each, with adapters on the device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier

import torch
from transformers import AutoConfig

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packing import pack
from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.base_weights import CheckpointWeights
from lorafleet.shard.batch import build_batch
from lorafleet.shard.checkpoint import Checkpoint
from lorafleet.shard.group import Group
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable

CPU = torch.device("cpu")
_PAGES_EACH, _PAGE, _MAX_LEN = 4, 16, 64
_ARENA_BYTES = 8 << 20


@dataclass
class Meeting:
    """Where the ranks' tensors come together."""

    size: int
    barrier: Barrier = field(init=False)
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.size)

    def gather(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in the order of the ranks."""
        self.tensors[rank] = x.clone()
        self.barrier.wait()
        found = [self.tensors[other] for other in range(self.size)]
        self.barrier.wait()
        return found


class ThreadGroup(Group):
    """A group whose ranks are threads of one process."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, 1, CPU, "")
        self.size, self._meeting = meeting.size, meeting

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._meeting.gather(self.rank, x)).sum(0))

    def all_gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meeting.gather(self.rank, x), 1)


def logits_of(
    model: Path, adapters: Sequence[Path | None], tokens: Sequence[Sequence[int]],
    chunks: Sequence[int], world: int, fused: bool = True, samples: Sequence[bool] | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Logits [tokens, vocab] of each adapter's tokens, equally many, all in one batch.

    `chunks`: tokens of a sequence that each step computes. Every rank must find the same logits.
    With `samples` logits [steps, vocab] of the last tokens of those that sample alone.
    """
    meeting = Meeting(world)
    # One after the other: building on the meta device patches torch for all threads.
    decoders = [_load(model, ThreadGroup(rank, meeting), fused) for rank in range(world)]

    def run(decoder: Decoder) -> list[torch.Tensor]:
        try:
            with torch.inference_mode():
                return _run(decoder, _attach(decoder, model, adapters), tokens, chunks, samples)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        ranks = list(pool.map(run, decoders))
    for found in ranks[1:]:
        assert all(map(torch.equal, found, ranks[0]))
    return ranks[0]


def _load(model: Path, group: Group, fused: bool) -> Decoder:
    decoder = Decoder(AutoConfig.from_pretrained(model), group, torch.float32, CPU)
    with Checkpoint(model) as checkpoint:
        decoder.load(checkpoint, lambda done, total: None)
    if fused:
        decoder.optimize(_MAX_LEN)
    return decoder


def _attach(decoder: Decoder, model: Path, adapters: Sequence[Path | None]) -> list[int]:
    """Every adapter in a slot; the slots in order, 0 for None."""
    tier = DeviceTier(_ARENA_BYTES, len(adapters), decoder.layout, torch.float32, CPU)
    decoder.attach_adapters(tier)
    base = CheckpointWeights(model, torch.float32)
    offset, slots = 0, []
    for slot, directory in enumerate(adapters, start=1):
        slots.append(0 if directory is None else slot)
        if directory is not None:
            spec = read_spec(directory, decoder.layout, base)
            packed = allocate(spec.form(decoder.layout, 4), torch.float32, pin=False)
            pack(spec, decoder.layout, packed, lambda done: None)
            tier.begin_move(packed, slot, offset)
            offset += packed.nbytes
    tier.wait_all()
    return slots


def _run(
    decoder: Decoder,
    slots: Sequence[int],
    tokens: Sequence[Sequence[int]],
    chunks: Sequence[int],
    samples: Sequence[bool] | None,
) -> list[torch.Tensor]:
    count, part = len(slots), decoder.partition
    rows = RowTable(count, _MAX_LEN, CPU)
    pool = KvPool(
        decoder.config.num_hidden_layers, count * _PAGES_EACH, part.local_kv_heads, part.head_dim,
        torch.float32, CPU,
    )  # fmt: skip
    for row in range(count):
        rows.begin(SequenceStart(row, list(tokens[row]), len(tokens[row]), SamplingParams()))
    found, first = [], 0
    for step, length in enumerate(chunks, start=1):
        held, needed = -(-first // _PAGE), -(-(first + length) // _PAGE)
        plan = StepPlan(
            step,
            num_prefills=count if length > 1 else 0,
            rows=list(range(count)),
            first_positions=[first] * count,
            token_counts=[length] * count,
            slots=list(slots),
            samples=list(samples or [False] * count),
            new_page_counts=[needed - held] * count,
            pages=[
                row * _PAGES_EACH + page for row in range(count) for page in range(held, needed)
            ],
        )
        rows.append_pages(plan)
        batch = build_batch(plan, rows, pool, max_rank=0)
        last = batch.last_tokens() if samples else None
        hidden = decoder.forward(batch.token_ids, batch.positions, batch.paged, batch.lora, last)
        each = sum(samples) if samples else count
        found.append(decoder.logits(hidden).view(each, -1, decoder.partition.vocab_size))
        first += length
    return list(torch.cat(found, 1))
