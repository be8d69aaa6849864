"""Mixture-of-experts layers: a router, and experts that compute the tokens sent to them.

An expert is a small MLP, cut between the ranks like a dense one: gate and up by their outputs, down
by its inputs. The ranks' results sum once a layer, after the experts' own sum. Router and experts
are sites, so that adapters of theirs are packed, moved and applied as those of any linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafleet.cache.layout import LoraSite, MoeLayer
from lorafleet.kernels.linear.op import linear
from lorafleet.kernels.lora.op import LoraBatch, Segment, lora_product
from lorafleet.shard.group import Group
from lorafleet.shard.layers import ColumnSite, LoraState, Site
from lorafleet.shard.partition import Partition

Activation = Callable[[torch.Tensor], torch.Tensor]


class _Naming(NamedTuple):
    """What a family's checkpoints and adapters call the layer and an expert's linears."""

    layer: str
    gate: str
    up: str
    down: str


_NAMINGS = {
    "MixtralSparseMoeBlock": _Naming("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3MoeSparseMoeBlock": _Naming("mlp", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, slots=True)
class Routing:
    """How many experts a token has, and whether their shares are made to sum to one."""

    top_k: int
    normalizes: bool

    @classmethod
    def of(cls, config: Any) -> Routing:
        """As the family routes; Mixtral always normalizes."""
        return cls(config.num_experts_per_tok, getattr(config, "norm_topk_prob", True))

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares (float32) and experts [num_tokens, top_k] of router logits [num_tokens, n]."""
        shares, experts = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        if self.normalizes:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares, experts


class ExpertSite(Site):
    """A linear of one expert, or two merged, over the tokens sent to it."""

    def of(self, rows: torch.Tensor, batch: LoraBatch) -> torch.Tensor:
        """[num_rows, in_local] -> [num_rows, out_local]; `batch` is of these rows."""
        if self._adapters is None:
            return linear(rows, self.weight)
        y, pending = lora_product(rows, self.weight, None, self._adapters, batch)
        if pending is not None:
            pending.add_(y)
        return y


class Expert(nn.Module):
    """One expert's MLP; a rank's result is a term of the sum over the ranks."""

    def __init__(self, gate_up: ExpertSite, down: ExpertSite, activation: Activation) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self._activation = activation

    @property
    def names(self) -> tuple[str, str, str]:
        """The targets gate, up and down."""
        gate, up = self.gate_up.layout.targets
        return gate.name, up.name, self.down.layout.targets[0].name

    def forward(self, rows: torch.Tensor, batch: LoraBatch) -> torch.Tensor:
        """[num_rows, hidden] -> [num_rows, hidden]."""
        gate, up = self.gate_up.of(rows, batch).chunk(2, dim=-1)
        return self.down.of(self._activation(gate) * up, batch)


class MoeBlock(nn.Module):
    """Stands where a decoder layer expects its mixture of experts."""

    def __init__(
        self,
        layout: MoeLayer,
        gate: ColumnSite,
        experts: list[Expert],
        routing: Routing,
        lora: LoraState,
        group: Group,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.gate, self.experts = gate, nn.ModuleList(experts)
        self._routing, self._lora, self._group = routing, lora, group

    @property
    def sites(self) -> Iterator[Site]:
        """The router's and every expert's, in the order of their use."""
        yield self.gate
        for expert in self.experts:
            assert isinstance(expert, Expert)
            yield from (expert.gate_up, expert.down)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, num_tokens, hidden] -> [1, num_tokens, hidden]."""
        rows = hidden[0]
        shares, chosen = self._routing.choose(self.gate.project(rows))
        dispatch = _Dispatch(chosen, len(self.experts), self._lora.batch)
        sent = rows[dispatch.tokens]
        returned = torch.empty_like(sent)
        for expert, start, stop, batch in dispatch.runs():
            returned[dispatch.order[start:stop]] = self.experts[expert](sent[start:stop], batch)
        terms = returned.view(*chosen.shape, -1) * shares.unsqueeze(-1)
        return self._group.all_reduce_(terms.sum(1).to(rows.dtype)).unsqueeze(0)


class _Dispatch:
    """A layer's pairs of token and expert, expert by expert and within each in token order.

    `order` [num_tokens * top_k]: which pair of the token-major order each is; `tokens`: its token.
    """

    def __init__(self, chosen: torch.Tensor, num_experts: int, batch: LoraBatch) -> None:
        flat = chosen.flatten().cpu()  # the host must know how many rows each expert gets
        order = flat.argsort(stable=True)
        self._host_tokens = order // chosen.shape[1]
        self._counts = flat.bincount(minlength=num_experts).tolist()
        self._batch = batch
        self.order = order.to(chosen.device)
        self.tokens = self._host_tokens.to(chosen.device)

    def runs(self) -> Iterator[tuple[int, int, int, LoraBatch]]:
        """(expert, start, stop, the batch of these rows) of every expert that has rows."""
        batch, stop = self._batch, 0
        row_slots = batch.row_slots if batch.is_empty else batch.row_slots[self.tokens]
        for expert, count in enumerate(self._counts):
            start, stop = stop, stop + count
            if batch.is_empty and count:
                yield expert, start, stop, batch
            elif count:
                segments = _segments(batch.segments, self._host_tokens[start:stop])
                own = LoraBatch(row_slots[start:stop], segments, batch.max_rank)
                yield expert, start, stop, own


def _segments(segments: tuple[Segment, ...], tokens: torch.Tensor) -> tuple[Segment, ...]:
    """What of the segments is among `tokens` (ascending), as runs of their indices."""
    bounds = torch.tensor([segment[1:] for segment in segments])
    runs = torch.searchsorted(tokens, bounds).tolist()
    pairs = zip(segments, runs, strict=True)
    return tuple((slot, start, stop) for (slot, _, _), (start, stop) in pairs if start < stop)


def is_moe(module: nn.Module) -> bool:
    """Whether this is a mixture of experts that `make_moe` knows."""
    return type(module).__name__ in _NAMINGS


def make_moe(
    path: str,
    module: Any,
    config: Any,
    partition: Partition,
    dtype: torch.dtype,
    device: torch.device,
    lora: LoraState,
    group: Group,
) -> MoeBlock:
    """The block that takes the place of transformers' own at `path`, its weights still empty."""
    naming = _NAMINGS[type(module).__name__]
    layer = f"{path.rpartition('.')[0]}.{naming.layer}"

    def site_of(kind: type[Site], *names: str) -> Any:
        targets = tuple(partition.target(f"{layer}.{name}") for name in names)
        return kind(LoraSite("+".join(t.name for t in targets), targets), False, dtype, device)

    gate = site_of(ColumnSite, "gate")
    experts = [
        Expert(
            site_of(ExpertSite, f"experts.{index}.{naming.gate}", f"experts.{index}.{naming.up}"),
            site_of(ExpertSite, f"experts.{index}.{naming.down}"),
            module.experts.act_fn,
        )
        for index in range(partition.num_experts)
    ]
    layout = MoeLayer(path, gate.layout.name, tuple(expert.names for expert in experts))
    return MoeBlock(layout, gate, experts, Routing.of(config), lora, group)
