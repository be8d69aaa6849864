"""An adapter's changes to the embedding and the output layer, as parts of its packed form.

Both layers are tables with a row for each token. An adapter may bring its own table, which may also
be longer or shorter than the base's, replace the rows of some tokens, and add a low-rank product to
all of them. peft writes these as (Embedding, Linear and TrainableTokensLayer of its lora tuner,
`modules_to_save`, and `save_embedding_layers` of save_pretrained, in 0.21.2):

    <module>.weight, .base_layer.weight, .token_adapter.base_layer.weight   the table
    <module>.token_adapter.trainable_tokens_delta                           rows of some tokens
    model.embed_tokens.lora_embedding_A [r, tokens], .lora_embedding_B [hidden, r]
    lm_head.lora_A.weight [r, hidden], .lora_B.weight [tokens, r]

A rank holds the rows of the base's entries it holds, then the rows of all tokens that the base does
not have, which are few. Row i of its parts is the i-th of those:

    <module>.weight      [rows, hidden]  a table as it is
    <module>.added_rows  [n, hidden]     without one: of the tokens that the base has not
    <module>.lora_rows   [rows, r]       what the tokens have of the low-rank product
    <module>.lora_basis  [r, hidden]     and what they share, the scale folded in
    <module>.token_index [n, 3]          sorted rows whose weights are replaced, see `digits`
    <module>.token_rows  [n, hidden]     by these
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.layout import VocabularyLayout
from lorafleet.cache.parts import PartSpec
from lorafleet.cache.peft_config import PeftConfig
from lorafleet.cache.safetensors_file import TensorRef
from lorafleet.cache.vocabulary_config import EMBEDDING, HEAD

if TYPE_CHECKING:
    import torch

# module, the adapter's table -> the base's tokens whose rows are another there
Differing = Callable[[str, TensorRef], list[int]]

DTYPES = ("F32", "F16", "BF16", "F64")
NUM_DIGITS = 3
DIGIT_BASE = 256  # every float type has the integers up to here

_UNEMBED = "model.unembed_tokens."
_TABLE, _DELTA, _ROWS, _BASIS = "table", "delta", "rows", "basis"
# What a tensor is, by the end of its name; of several for the same, the first one counts.
_BOTH = {
    ".weight": _TABLE,
    ".base_layer.weight": _TABLE,
    ".token_adapter.base_layer.weight": _TABLE,
    ".modules_to_save.weight": _TABLE,
    ".original_module.weight": "",  # what the table was before training
    ".token_adapter.trainable_tokens_delta": _DELTA,
}
_SUFFIXES = {
    EMBEDDING: _BOTH | {".lora_embedding_A": _ROWS, ".lora_embedding_B": _BASIS},
    HEAD: _BOTH | {".lora_A.weight": _BASIS, ".lora_B.weight": _ROWS},
}
# The LoRA factors as they are stored: tokens in the first dimension, or in the second.
_IS_TRANSPOSED = {EMBEDDING: True, HEAD: False}


@dataclass(frozen=True, slots=True)
class _Change:
    """What an adapter does to one of the two tables; `ids` are of the rows of `delta`."""

    module: str
    table: TensorRef | None = None
    delta: TensorRef | None = None
    ids: tuple[int, ...] = ()
    rows: TensorRef | None = None
    basis: TensorRef | None = None

    def num_tokens(self, vocabulary: VocabularyLayout) -> int:
        """Tokens the layer has with the adapter."""
        if self.table is None:
            return vocabulary.size
        return self.table.shape[0] if self.table.shape else 0


def vocabulary_name(name: str) -> str | None:
    """The name, here, of a tensor of one of the two layers; None for any other tensor.

    `name` is without peft's prefix. Tinker's exports call the head `model.unembed_tokens`.
    """
    if name.startswith(_UNEMBED):
        return f"{HEAD}.{name.removeprefix(_UNEMBED)}"
    return name if name.startswith((f"{EMBEDDING}.", f"{HEAD}.")) else None


def vocabulary_parts(
    tensors: Mapping[str, TensorRef],
    config: PeftConfig,
    vocabulary: VocabularyLayout,
    differing: Differing | None = None,
) -> tuple[tuple[PartSpec, ...], int]:
    """The parts, and how many tokens prompts may name; `tensors` by name without peft's prefix.

    With `differing` a table of which few rows are another than the base's takes room for these.
    Raises AdapterUnservable naming the tensor or the field at fault.
    """
    read = _read(tensors, config)
    _check_saved(read, config, vocabulary)
    changes = _tied(read, config, vocabulary)
    parts = [part for change in changes for part in _parts(change, config, vocabulary, differing)]
    return tuple(parts), changes[0].num_tokens(vocabulary)


def num_rows(num_tokens: int, vocabulary: VocabularyLayout) -> int:
    """Rows of a table of so many tokens that this rank holds."""
    start, stop = vocabulary.held
    return max(0, min(stop, num_tokens) - start) + max(0, num_tokens - vocabulary.size)


def digits(numbers: Sequence[int]) -> torch.Tensor:
    """Integers below 2^24 as [n, 3] floats, least significant first, exact in every float type."""
    import torch

    found = torch.tensor(numbers, dtype=torch.int64).unsqueeze(1)
    powers = torch.tensor([DIGIT_BASE**place for place in range(NUM_DIGITS)])
    return (found // powers % DIGIT_BASE).float()


def _read(tensors: Mapping[str, TensorRef], config: PeftConfig) -> dict[str, _Change]:
    found: dict[str, dict[str, TensorRef]] = {EMBEDDING: {}, HEAD: {}}
    left = set(tensors)
    for module, suffixes in _SUFFIXES.items():
        for suffix, kind in suffixes.items():
            name = module + suffix
            if name in left:
                left.discard(name)
                found[module].setdefault(kind, tensors[name])
    if left:
        raise AdapterUnservable(
            f"The tensor {shown(tensors[min(left)].name)} is not among what is served of "
            "embed_tokens and lm_head: LoRA, whole weights and trained tokens."
        )
    return {
        module: _Change(
            module,
            table=kinds.get(_TABLE),
            delta=kinds.get(_DELTA),
            ids=config.vocabulary.token_ids.get(module, ()),
            rows=kinds.get(_ROWS),
            basis=kinds.get(_BASIS),
        )
        for module, kinds in found.items()
    }


def _tied(
    changes: dict[str, _Change], config: PeftConfig, vocabulary: VocabularyLayout
) -> list[_Change]:
    """Embedding and head, each with what it has from the other where the base ties them.

    A table that is no copy of the adapter's own (`modules_to_save`) is the base's parameter, so it
    is the other layer's too. Trained tokens follow the embedding's unless the head has its own.
    """
    embedding, head = changes[EMBEDDING], changes[HEAD]
    if not vocabulary.is_tied:
        return [embedding, head]
    given = config.vocabulary
    if head.table is None and (given.ensures_tying or EMBEDDING not in given.saved):
        head = replace(head, table=embedding.table)
    elif embedding.table is None and HEAD not in given.saved:
        embedding = replace(embedding, table=head.table)
    if head.ids in ((), embedding.ids):
        head = replace(head, delta=embedding.delta, ids=embedding.ids)
    return [embedding, head]


def _check_saved(
    changes: Mapping[str, _Change], config: PeftConfig, vocabulary: VocabularyLayout
) -> None:
    given = config.vocabulary
    for module in sorted(given.saved):
        if changes[module].table is None:
            raise AdapterUnservable(
                f"modules_to_save names {module}, of which the adapter has no weights."
            )
    both = given.saved & given.token_ids.keys()
    if vocabulary.is_tied and EMBEDDING in given.token_ids and HEAD in given.saved:
        both = frozenset((HEAD,))  # it is tied to the embedding's tokens and has its own as well
    if both:
        raise AdapterUnservable(
            f"modules_to_save and trainable_token_indices both change {min(both)}, which is not "
            "served."
        )


def _parts(
    change: _Change,
    config: PeftConfig,
    vocabulary: VocabularyLayout,
    differing: Differing | None,
) -> list[PartSpec]:
    num_tokens, hidden = change.num_tokens(vocabulary), vocabulary.hidden_size
    if change.table is not None:
        _check(change.table, (num_tokens, hidden))
    _check_tokens(change, num_tokens, hidden)
    replaced = _replaced(change, vocabulary, differing)
    start, stop = vocabulary.held
    added = range(vocabulary.size, num_tokens)
    if replaced is None:
        held = [*range(start, min(stop, num_tokens)), *added]
        parts = [_rows_part(change, "weight", held, hidden)]
    else:
        parts = [_rows_part(change, "added_rows", added, hidden)] if added else []
        if replaced:
            held = [token for token in replaced if start <= token < stop]
            index, shape = [token - start for token in held], (len(held), NUM_DIGITS)
            parts.append(_part(change, "token_index", shape, (), lambda _: digits(index)))
            parts.append(_rows_part(change, "token_rows", held, hidden))
    return [*parts, *_lora_parts(change, config, vocabulary)]


def _replaced(
    change: _Change, vocabulary: VocabularyLayout, differing: Differing | None
) -> list[int] | None:
    """The base's tokens whose rows change, sorted; None where the table is to be held as it is."""
    trained = {token for token in change.ids if token < vocabulary.size}
    if change.table is None:
        return sorted(trained)
    if differing is None or change.table.shape[0] < vocabulary.size:
        return None
    replaced = sorted(trained.union(differing(change.module, change.table)))
    return replaced if len(replaced) <= vocabulary.size // 2 else None


def _rows_part(change: _Change, what: str, tokens: Sequence[int], hidden: int) -> PartSpec:
    refs = tuple(ref for ref in (change.table, change.delta) if ref is not None)
    build = partial(_build_rows, change=change, tokens=list(tokens))
    return _part(change, what, (len(tokens), hidden), refs, build)


def _lora_parts(
    change: _Change, config: PeftConfig, vocabulary: VocabularyLayout
) -> list[PartSpec]:
    if change.rows is None and change.basis is None:
        return []
    if change.rows is None or change.basis is None:
        given = change.rows or change.basis
        raise AdapterUnservable(
            f"{change.module} has {shown(given.name if given else '')} and not its other half."
        )
    num_tokens, hidden = change.num_tokens(vocabulary), vocabulary.hidden_size
    rank, is_transposed = config.rank_of(change.module), _IS_TRANSPOSED[change.module]
    scale = config.scale_of(change.module)
    _check(change.rows, (rank, num_tokens) if is_transposed else (num_tokens, rank))
    _check(change.basis, (hidden, rank) if is_transposed else (rank, hidden))

    def rows(weights: Sequence[torch.Tensor]) -> torch.Tensor:
        return _held(weights[0].T if is_transposed else weights[0], vocabulary)

    def basis(weights: Sequence[torch.Tensor]) -> torch.Tensor:
        return (weights[0].T if is_transposed else weights[0]).float() * scale

    shape = (num_rows(num_tokens, vocabulary), rank)
    return [
        _part(change, "lora_rows", shape, (change.rows,), rows, rank),
        _part(change, "lora_basis", (rank, hidden), (change.basis,), basis, rank),
    ]


def _part(
    change: _Change,
    what: str,
    shape: tuple[int, ...],
    refs: tuple[TensorRef, ...],
    build: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    rank: int = 0,
) -> PartSpec:
    return PartSpec(f"{change.module}.{what}", shape, refs, build, change.module, rank)


def _held(table: torch.Tensor, vocabulary: VocabularyLayout) -> torch.Tensor:
    """This rank's rows of a whole table."""
    import torch

    start, stop = vocabulary.held
    return torch.cat([table[start:stop], table[vocabulary.size :]])


def _build_rows(
    weights: Sequence[torch.Tensor], change: _Change, tokens: list[int]
) -> torch.Tensor:
    """The adapter's rows of tokens: the trained ones where there are, else its table's."""
    import torch

    places = {token: place for place, token in enumerate(change.ids)}
    if change.table is None:
        return weights[0][[places[token] for token in tokens]]
    rows = weights[0][tokens]
    trained = [row for row, token in enumerate(tokens) if token in places]
    if trained:
        delta = weights[1][[places[tokens[row]] for row in trained]]
        rows = rows.to(torch.promote_types(rows.dtype, delta.dtype))
        rows[trained] = delta.to(rows.dtype)
    return rows


def _check(tensor: TensorRef, wanted: tuple[int, int]) -> None:
    if tensor.dtype not in DTYPES:
        raise AdapterUnservable(
            f"{shown(tensor.name)} is {tensor.dtype}; it must be one of {', '.join(DTYPES)}."
        )
    if tensor.shape != wanted or 0 in wanted:
        raise AdapterUnservable(
            f"{shown(tensor.name)} has shape {list(tensor.shape)}; with the config and the base "
            f"model it must be {list(wanted)}."
        )


def _check_tokens(change: _Change, num_tokens: int, hidden: int) -> None:
    if bool(change.ids) != (change.delta is not None):
        what = "weights" if change.delta else "tokens"
        raise AdapterUnservable(
            f"Of {change.module} the adapter has only the {what} of trainable_token_indices."
        )
    if change.delta is not None:
        _check(change.delta, (len(change.ids), hidden))
        if max(change.ids) >= num_tokens:
            raise AdapterUnservable(
                f"trainable_token_indices names token {max(change.ids)}; {change.module} has "
                f"{num_tokens} tokens."
            )
