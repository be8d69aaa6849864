"""Decoder: transformers' own modelling over this rank's slice of the weights.

The model is built on the meta device from a config that names this rank's heads and columns only;
its linears and its embedding are swapped for the tensor-parallel ones of `layers` and `vocabulary`,
and the weights are then streamed from the checkpoint straight into place. A rank never holds the
whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.layout import LoraSite, ModelLayout, VocabularyLayout
from lorafleet.kernels.lora.op import LoraBatch
from lorafleet.shard import attention
from lorafleet.shard.attention import AttentionKind, PagedBatch, attention_kind
from lorafleet.shard.checkpoint import Checkpoint
from lorafleet.shard.errors import BadCheckpoint, UnsupportedModel
from lorafleet.shard.experts import MoeBlock, is_moe, make_moe
from lorafleet.shard.fused_layers import FusedLayers, Keep
from lorafleet.shard.group import Group
from lorafleet.shard.last_tokens import LastTokens
from lorafleet.shard.layers import (
    ColumnMember,
    ColumnSite,
    LoraState,
    RowSite,
    Segments,
    Site,
    slot_parts,
)
from lorafleet.shard.partition import MERGED, Interval, Partition
from lorafleet.shard.vocabulary import VocabEmbedding, VocabHead

# Families whose tokens are proven equal to transformers + peft by the tests.
SUPPORTED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Phi3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)


_RANDOM_STD = 0.02


def check_supported(config: Any) -> str:
    """The architecture of a config. Raises UnsupportedModel naming it and what is supported."""
    names = getattr(config, "architectures", None) or ["(none named)"]
    if names[0] not in SUPPORTED:
        raise UnsupportedModel(
            f"architecture {names[0]} is not supported; supported are {', '.join(SUPPORTED)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel("quantized checkpoints (quantization_config) are not supported")
    return str(names[0])


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter and where in the checkpoint it comes from.

    `names` are joined along the first dimension, each cut to its intervals of `rows`; `columns`
    cuts the second dimension instead.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    rows: tuple[tuple[Interval, ...], ...]
    columns: Interval | None = None

    def load(self, checkpoint: Checkpoint) -> None:
        """Fills the parameter. Raises BadCheckpoint: no such tensor, or another shape."""
        if self.columns is not None:
            tensor = checkpoint.columns(self.names[0], self.columns)
        else:
            parts = zip(self.names, self.rows, strict=True)
            tensor = torch.cat([checkpoint.rows(name, rows) for name, rows in parts])
        if tensor.shape != self.parameter.shape:
            raise BadCheckpoint(
                f"{' + '.join(self.names)}: the configuration asks for "
                f"{tuple(self.parameter.shape)} on this rank, the checkpoint gives "
                f"{tuple(tensor.shape)}"
            )
        with torch.no_grad():
            self.parameter.copy_(tensor)


class Decoder:
    """The model of one rank: token ids in, logits out.

    `sites` in layer order are where adapters act; `layout` describes them to the adapter tiers.
    """

    def __init__(
        self,
        config: Any,
        group: Group,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Builds the model without weights; `load` brings them."""
        self.architecture = check_supported(config)
        self.config = config
        self.partition = Partition.of(config, group.rank, group.size)
        self.dtype, self.device = dtype, device
        self._group = group
        self._line: FusedLayers | None = None
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._lora = LoraState(device)
        self._parts_of: Callable[[int], Mapping[str, torch.Tensor]] = lambda slot: {}
        model = _on_meta(self.partition.local_config(config), dtype)
        self._base: Any = model.model
        self.sites = self._swap_linears()
        self.head = self._swap_vocabulary(model)
        self.layout = ModelLayout(
            config.name_or_path,
            tuple(site.layout for site in self.sites),
            self._vocabulary(),
            tuple(block.layout for block in self._moe_blocks()),
        )

    def attach_adapters(self, adapters: DeviceTier) -> None:
        """Gives every site its adapters' weights, and every forward their parts."""
        self._parts_of = adapters.parts
        self._base.embed_tokens.attach(self._lora)
        for index, site in enumerate(self.sites):
            site.attach(self._lora, adapters.site(index))

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        paged: PagedBatch,
        lora: LoraBatch,
        last: LastTokens | None = None,
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden] of a step's tokens; ids and positions [num_tokens].

        With `last` those of these tokens alone.
        """
        self._lora.begin(lora, self._parts_of)
        if self._line is not None:
            embedded = self._base.embed_tokens(token_ids.unsqueeze(0))[0]
            return self._line.forward(embedded, positions, paged, self._keep(last))
        output = self._base(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            paged=paged,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden if last is None else hidden[last.tokens]

    def _keep(self, last: LastTokens | None) -> Keep | None:
        """Picks the last tokens, and tells the sites."""
        if last is None:
            return None

        def keep(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self._lora.begin(last.lora, self._parts_of)
            return a[last.tokens], b[last.tokens]

        return keep

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, segments: Segments = ()) -> torch.Tensor:
        """float32 logits [n, vocab_size] of hidden states [n, hidden]; `segments` are their slots.

        Where an adapter has tokens that the base has not, there are more columns: as many as the
        largest vocabulary. A token that a row does not have is -inf there.
        """
        runs = slot_parts(segments, self._parts_of)
        raw = self.head(hidden, runs)
        logits = self.finish_logits(raw)
        return logits.masked_fill_(raw == -torch.inf, -torch.inf) if runs else logits

    @property
    def has_plain_logits(self) -> bool:
        """Whether `finish_logits` changes nothing but the dtype."""
        return self._softcap is None

    def finish_logits(self, raw: torch.Tensor) -> torch.Tensor:
        """float32 logits from what the head gives, the model's soft cap applied."""
        logits = raw.float()
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
        """Streams this rank's slice of every weight. Raises BadCheckpoint.

        `progress(done_bytes, total_bytes)` is called as tensors arrive.
        """
        weights = list(self._weights())
        total, done = sum(weight.parameter.nbytes for weight in weights), 0
        for weight in weights:
            weight.load(checkpoint)
            done += weight.parameter.nbytes
            progress(done, total)
        _buffers_to(self._base, self.device)

    def randomize(self, seed: int) -> None:
        """Fills every weight without a checkpoint: matrices from N(0, 0.02), vectors with ones."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for weight in self._weights():
                if weight.parameter.dim() > 1:
                    weight.parameter.normal_(std=_RANDOM_STD, generator=generator)
                else:
                    weight.parameter.fill_(1)
        _buffers_to(self._base, self.device)

    def optimize(self, max_len: int) -> None:
        """Prepares the loaded model for sequences of up to `max_len` tokens.

        Weights are laid out as their device multiplies them fastest; layers that have the shape run
        as FusedLayers.
        """
        for site in self.sites:
            site.prepack()
        self.head.prepack()
        if FusedLayers.fits(self._base):
            self._line = FusedLayers(self._base, max_len)

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """How each layer attends."""
        return tuple(attention_kind(layer.self_attn) for layer in self._base.layers)

    @property
    def has_experts(self) -> bool:
        """Whether the host takes part in every step, to send tokens to experts."""
        return bool(self.layout.moe)

    def _moe_blocks(self) -> Iterator[MoeBlock]:
        return (module for module in self._base.modules() if isinstance(module, MoeBlock))

    def _swap_linears(self) -> list[Site]:
        sites: list[Site] = []
        for name, module in list(self._base.named_modules()):
            if is_moe(module):
                block = make_moe(
                    f"model.{name}", module, self.config, self.partition, self.dtype, self.device,
                    self._lora, self._group,
                )  # fmt: skip
                self._base.set_submodule(name, block)
                sites += block.sites
                continue
            linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
            for members in _groups(linears):
                site = self._make_site(name, members, linears)
                if site is not None:
                    sites.append(site)
        return sites

    def _make_site(
        self, parent: str, members: tuple[str, ...], linears: dict[str, nn.Linear]
    ) -> Site | None:
        """Puts a site in the place of `members`, or leaves a linear the plan does not cut."""
        style = _plan_style(self.config.base_model_tp_plan, f"{parent}.{members[0]}")
        if not style.startswith(("colwise", "rowwise")):
            return None
        module = self._base.get_submodule(parent)
        names = [f"model.{parent}.{member}" for member in members]
        has_bias = linears[members[0]].bias is not None
        targets = [replace(self.partition.target(name), has_bias=has_bias) for name in names]
        layout = LoraSite("+".join(names), tuple(targets))
        if style.startswith("rowwise"):
            row = RowSite(layout, has_bias, self.dtype, self.device, self._group)
            setattr(module, members[0], row)
            return row
        column = ColumnSite(layout, has_bias, self.dtype, self.device)
        if len(members) == 1:
            setattr(module, members[0], column)
            return column
        module.add_module("_".join(members), column)
        for index, member in enumerate(members):
            setattr(module, member, ColumnMember(column, index))
        return column

    def _swap_vocabulary(self, model: Any) -> VocabHead:
        start, stop = self.partition.vocab_range
        lookup = self._base.embed_tokens
        lookup.weight = self._empty(stop - start, self.partition.hidden_size)
        lookup.padding_idx = None  # plays no part in a lookup, and may lie outside this slice
        self._base.embed_tokens = VocabEmbedding(
            lookup, start, self.partition.vocab_size, self._group
        )
        tied = self.config.tie_word_embeddings
        weight = lookup.weight if tied else self._empty(stop - start, self.partition.hidden_size)
        bias = self._empty(stop - start) if model.lm_head.bias is not None else None
        return VocabHead(weight, bias, self.partition.vocab_size, self._group)

    def _vocabulary(self) -> VocabularyLayout:
        part = self.partition
        tied = bool(self.config.tie_word_embeddings)
        return VocabularyLayout(part.vocab_size, part.hidden_size, part.vocab_range, tied)

    def _weights(self) -> Iterator[Weight]:
        yield from self._vocabulary_weights()
        yield from self._site_weights()
        yield from self._small_weights()

    def _vocabulary_weights(self) -> Iterator[Weight]:
        rows = (self.partition.vocab_range,)
        embedding = self._base.embed_tokens.lookup.weight
        yield Weight(embedding, ("model.embed_tokens.weight",), (rows,))
        if self.head.weight is not embedding:
            yield Weight(self.head.weight, ("lm_head.weight",), (rows,))
        if self.head.bias is not None:
            yield Weight(self.head.bias, ("lm_head.bias",), (rows,))

    def _site_weights(self) -> Iterator[Weight]:
        for site in self.sites:
            targets = site.layout.targets
            rows = tuple(target.out_ranges for target in targets)
            is_cut = targets[0].in_local < targets[0].in_features
            columns = targets[0].in_range if is_cut else None
            yield Weight(site.weight, tuple(f"{t.name}.weight" for t in targets), rows, columns)
            if site.bias is not None:
                yield Weight(site.bias, tuple(f"{t.name}.bias" for t in targets), rows)

    def _small_weights(self) -> Iterator[Weight]:
        """Norms and the like, which every rank keeps whole."""
        for name, parameter in list(self._base.named_parameters()):
            if parameter.is_meta:
                real = self._empty(*parameter.shape)
                parent, _, leaf = name.rpartition(".")
                setattr(self._base.get_submodule(parent), leaf, real)
                yield Weight(real, (f"model.{name}",), (((0, parameter.shape[0]),),))

    def _empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(
            torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False
        )


def _on_meta(config: Any, dtype: torch.dtype) -> Any:
    config._attn_implementation = attention.NAME
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _groups(linears: dict[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Children of one module, those that share an input merged, in the order they are called."""
    merged = [group for group in MERGED if linears.keys() >= set(group)]
    alone = [(name,) for name in linears if not any(name in group for group in merged)]
    return [*merged, *alone]


def _plan_style(plan: dict[str, str], name: str) -> str:
    return next((style for pattern, style in plan.items() if fnmatch(name, pattern)), "")


def _buffers_to(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
