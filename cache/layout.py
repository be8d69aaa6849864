"""Where in the served model adapters can attach, and which part of it this rank holds."""

from __future__ import annotations

from dataclasses import dataclass

Interval = tuple[int, int]  # [start, stop)

MAX_SITE_TARGETS = 3


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear layer of the base model as one rank holds it.

    `name` is the full path in the model, such as `model.layers.0.self_attn.q_proj`; the features
    are the whole layer's. A is [rank, in_features] and B is [out_features, rank] in an adapter's
    file: this rank holds columns `in_range` of A and, in local order, rows `out_ranges` of B.
    """

    name: str
    in_features: int
    out_features: int
    in_range: Interval
    out_ranges: tuple[Interval, ...]
    has_bias: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.in_range[0] < self.in_range[1] <= self.in_features, self
        assert all(0 <= start < stop <= self.out_features for start, stop in self.out_ranges), self

    @property
    def in_local(self) -> int:
        """Input features this rank computes with."""
        return self.in_range[1] - self.in_range[0]

    @property
    def is_partial(self) -> bool:
        """Whether this rank computes a term of the outputs, which the ranks then sum."""
        return self.in_local < self.in_features

    @property
    def out_local(self) -> int:
        """Output features this rank produces."""
        return sum(stop - start for start, stop in self.out_ranges)


@dataclass(frozen=True, slots=True)
class LoraSite:
    """Targets that share one input; their local outputs are concatenated in this order."""

    name: str
    targets: tuple[TargetModule, ...]

    def __post_init__(self) -> None:
        assert 1 <= len(self.targets) <= MAX_SITE_TARGETS, self
        assert len({target.in_range for target in self.targets}) == 1, self

    @property
    def in_local(self) -> int:
        """Input features of every target on this rank."""
        return self.targets[0].in_local

    @property
    def out_splits(self) -> tuple[int, ...]:
        """Local output features, target by target."""
        return tuple(target.out_local for target in self.targets)


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """A mixture of experts; its linears are targets like others.

    `path` is where transformers has it, such as `model.layers.0.mlp`. `gate` is the router's target
    and `experts` are each expert's gate, up and down, by the names of the model's checkpoints.
    """

    path: str
    gate: str
    experts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class VocabularyLayout:
    """The base model's embedding and output layer, and the entries this rank holds of both."""

    size: int
    hidden_size: int
    held: Interval
    is_tied: bool  # one weight serves both


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Every site of the served model, in the order of the slot table's second axis."""

    model_id: str
    sites: tuple[LoraSite, ...]
    vocabulary: VocabularyLayout
    moe: tuple[MoeLayer, ...] = ()

    def moe_targets(self) -> frozenset[str]:
        """The targets that are routers or experts."""
        experts = {name for layer in self.moe for names in layer.experts for name in names}
        return frozenset(experts | {layer.gate for layer in self.moe})

    def targets(self) -> dict[str, TargetModule]:
        """Every target by its name."""
        return {target.name: target for site in self.sites for target in site.targets}
