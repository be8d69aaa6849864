"""From an adapter's files to one buffer that the kernels read as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorafleet.cache.adapter_files import AdapterSpec
from lorafleet.cache.errors import AdapterUnservable, SourceUnavailable
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.linears import ModuleSpec
from lorafleet.cache.packed_form import PackedForm
from lorafleet.cache.parts import PartSpec
from lorafleet.cache.safetensors_file import TensorRef
from lorafleet.cache.weights_reader import WeightsReader

_BLOCK_ELEMENTS = 1 << 17  # of B at a time, which stay in a core's cache


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedAdapter:
    """This rank's part of an adapter: a 1-D buffer of the serving dtype, laid out by `form`.

    The scale alpha / r (alpha / sqrt(r) for rsLoRA) is folded into B.
    """

    form: PackedForm
    buffer: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.form.nbytes


def pack(
    spec: AdapterSpec,
    layout: ModelLayout,
    packed: PackedAdapter,
    progress: Callable[[int], None],
) -> None:
    """Fills `packed.buffer`; `progress` gets the bytes of tensors read so far.

    Raises AdapterUnservable for values that are not finite, in the file or in the serving dtype,
    and SourceUnavailable when the files changed meanwhile.
    """
    with WeightsReader(spec.directory) as reader:
        for site, row in zip(layout.sites, packed.form.rows, strict=True):
            a_offset = row[0]
            for target, b_offset in zip(site.targets, row[3::2], strict=False):
                module = spec.modules.get(target.name)
                if module is not None:
                    _pack_a(reader.read(module.a), module, packed.buffer, a_offset)
                    _pack_b(reader.read(module.b), module, packed.buffer, b_offset)
                    a_offset += module.rank * target.in_local
                    progress(reader.done)
        for part, placed in zip(spec.parts, packed.form.parts, strict=True):
            block = packed.buffer[placed.offset : placed.offset + placed.num_elements]
            _pack_part([reader.read(ref) for ref in part.refs], part, block.view(placed.shape))
            progress(reader.done)
    if not spec.is_current():
        raise SourceUnavailable("The adapter's files changed while they were read; try again.")


def read_tensor(spec: AdapterSpec, ref: TensorRef) -> torch.Tensor:
    """One of the adapter's tensors, in the file's own dtype and shape. Raises as `pack`."""
    with WeightsReader(spec.directory) as reader:
        return reader.read(ref)


def _pack_a(weight: torch.Tensor, module: ModuleSpec, buffer: torch.Tensor, offset: int) -> None:
    start, stop = module.target.in_range
    block = buffer[offset : offset + module.rank * (stop - start)].view(module.rank, stop - start)
    block.copy_(weight[:, start:stop])
    _check_finite(weight, block, f"lora_A of {module.target.name}")


def _pack_b(weight: torch.Tensor, module: ModuleSpec, buffer: torch.Tensor, offset: int) -> None:
    width = module.target.out_local
    block = buffer[offset : offset + module.rank * width].view(module.rank, width)
    at = 0
    for start, stop in module.target.out_ranges:
        for rows in weight[start:stop].split(max(1, _BLOCK_ELEMENTS // module.rank)):
            # torch computes the product of a half type and a number in float32, with one rounding
            # at the end, as the longer way does. Copies that transpose and convert are slow.
            exact = rows if rows.dtype == block.dtype else rows.to(torch.float32)
            block[:, at : at + len(rows)] = (exact * module.scale).to(block.dtype).T
            at += len(rows)
    _check_finite(weight, block, f"lora_B of {module.target.name}")


def _pack_part(weights: list[torch.Tensor], part: PartSpec, block: torch.Tensor) -> None:
    for ref, weight in zip(part.refs, weights, strict=True):
        _check_finite(weight, weight, ref.name)
    built = part.build(weights)
    block.copy_(built)
    _check_finite(built, block, part.name)


def _check_finite(weight: torch.Tensor, block: torch.Tensor, name: str) -> None:
    """The whole weight is checked, so that every rank comes to the same answer about the file."""
    # What is not finite stays so in the block, however it is scaled and rounded.
    is_whole = block.numel() == weight.numel()
    if _is_finite(block) and (is_whole or _is_finite(weight)):
        return
    if not _is_finite(weight):
        raise AdapterUnservable(f"{name} holds values that are not finite numbers.")
    raise AdapterUnservable(f"{name} holds values too large for {block.dtype}.")


def _is_finite(tensor: torch.Tensor) -> bool:
    """As `isfinite().all()`, in one pass and a twentieth of the time: NaN counts as both bounds."""
    return tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.aminmax())
