"""LoRA on mixtures of experts, from the forms peft saves to one A and one B per expert's linear.

- `...experts.3.w1.lora_A.weight`: adapters of single linears, from before transformers 5. They are
  named as the layout's targets are; nothing is left to do.
- `target_parameters` with `experts.gate_up_proj` or `experts.down_proj`: one A [experts * rank, in]
  and one B [out, rank * experts] for all of a layer's experts. A's rows run over an expert's ranks
  first, B's columns over the experts first (peft 0.21, `ParamWrapper.get_delta_factors`). peft
  wraps gate_up_proj first, so that with both it is `...experts.base_layer`, else `...experts`.
- `...experts.w1`, `w3` and `w2` (gate, up, down), or `gate_up_proj` and `down_proj`, with one
  A [experts, rank, in] and one B [experts, out, rank]; a first dimension of 1 is every expert's.
  This "shared outer" form (vLLM's `enable_moe_shared_loras`, SGLang's `experts_shared_outer_loras`,
  Tinker's and Megatron-Bridge's exports) shares A of gate and up and B of down. peft has no reader.
- `mlp.gate`: the router, by the name it has since transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.layout import ModelLayout, MoeLayer
from lorafleet.cache.linear_tensors import LORA_A
from lorafleet.cache.peft_config import PeftConfig, ends_of
from lorafleet.cache.safetensors_file import TensorCut, TensorRef

Modules = dict[str, dict[str, TensorRef]]  # module name -> its tensors by kind
Experts = list[tuple[str, ...]]  # each one's targets that a tensor is for, outputs in order
Index = tuple[int | slice, ...]

_PARAMETERS = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
# Stacked linears, and which of an expert's (gate, up, down) each is, outputs in this order.
_STACKED = {"w1": (0,), "w3": (1,), "w2": (2,), "gate_up_proj": (0, 1), "down_proj": (2,)}


class ExpertFiles:
    """An adapter's tensors by the layout's names, and the names its config knows them by."""

    def __init__(self, modules: Modules, config: PeftConfig, layout: ModelLayout) -> None:
        """Raises AdapterUnservable for shapes that are not the experts'."""
        self.modules: Modules = dict(modules)
        self._config, self._layout = config, layout
        self._targets = layout.targets()
        self._config_names: dict[str, str] = {}
        self._check_parameters()
        for layer in layout.moe:
            self._rename(f"{layer.path}.gate", layer.gate)
            self._unfold_layer(layer)

    def config_name(self, target: str) -> str:
        """What `rank_pattern` and `alpha_pattern` call a target."""
        return self._config_names.get(target, target)

    def _check_parameters(self) -> None:
        wanted = self._config.target_parameters
        known = [f"{name}.weight" for name in self._targets] if wanted else []
        for layer in self._layout.moe if wanted else ():
            known += [f"{layer.path}.{name}" for name in _PARAMETERS]
        found = {end for name in known for end in ends_of(name)}
        if unknown := sorted(wanted - found):
            raise AdapterUnservable(
                f"target_parameters names {shown(unknown[0])}, which is not among the adaptable "
                f"parameters of {self._layout.model_id}."
            )

    def _rename(self, name: str, target: str) -> None:
        if name in self.modules:
            self._put(target, self.modules.pop(name), name)

    def _unfold_layer(self, layer: MoeLayer) -> None:
        wrapper = f"{layer.path}.experts"
        for path in dict.fromkeys((wrapper, layer.experts[0][0].rsplit(".", 2)[0])):
            for name, places in _STACKED.items():
                experts = [tuple(expert[place] for place in places) for expert in layer.experts]
                for kind, tensor in self.modules.pop(f"{path}.{name}", {}).items():
                    self._unfold_stack(kind, tensor, f"{path}.{name}", experts)
        if not self.modules.keys() & {wrapper, f"{wrapper}.base_layer"}:
            return
        parameters: dict[str, list[tuple[str, ...]]] = {
            f"{wrapper}.gate_up_proj": [experts[:2] for experts in layer.experts],
            f"{wrapper}.down_proj": [experts[2:] for experts in layer.experts],
        }
        targeted = [name for name in parameters if self._config.targets_parameter(name)]
        wrappers = [f"{wrapper}.base_layer", wrapper][2 - len(targeted) :]
        for parameter, name in zip(targeted, wrappers, strict=True):
            for kind, tensor in self.modules.pop(name, {}).items():
                self._unfold(kind, tensor, parameter, parameters[parameter])

    def _unfold(self, kind: str, tensor: TensorRef, parameter: str, experts: Experts) -> None:
        """Cuts a tensor that has all experts' ranks in one dimension."""
        rank, count = self._config.rank_of(parameter), len(experts)
        ins, outs = self._features(experts)
        if kind == LORA_A:
            self._check_shape(kind, tensor, parameter, (count * rank, ins))
            view: tuple[int, ...] = (count, rank, ins)
        else:
            self._check_shape(kind, tensor, parameter, (outs, rank * count))
            view = (outs, rank, count)

        def index(expert: int, outputs: slice) -> Index:
            return (expert,) if kind == LORA_A else (outputs, slice(None), expert)

        self._put_cuts(kind, tensor, parameter, experts, view, index)

    def _unfold_stack(self, kind: str, tensor: TensorRef, name: str, experts: Experts) -> None:
        """Cuts a tensor whose first dimension is the experts, or 1 for all of them alike."""
        rank = self._config.rank_of(name)
        ins, outs = self._features(experts)
        matrix = (rank, ins) if kind == LORA_A else (outs, rank)
        is_shared = tensor.shape[:1] == (1,)
        self._check_shape(kind, tensor, name, (1 if is_shared else len(experts), *matrix))

        def index(expert: int, outputs: slice) -> Index:
            number = 0 if is_shared else expert
            return (number,) if kind == LORA_A else (number, outputs)

        self._put_cuts(kind, tensor, name, experts, tensor.shape, index)

    def _features(self, experts: Experts) -> tuple[int, int]:
        """Inputs, and outputs of all the linears that one expert has of these."""
        first = self._targets[experts[0][0]]
        return first.in_features, len(experts[0]) * first.out_features

    def _check_shape(
        self, kind: str, tensor: TensorRef, parameter: str, wanted: tuple[int, ...]
    ) -> None:
        if tensor.shape != wanted:
            raise AdapterUnservable(
                f"{kind} of {parameter} has shape {list(tensor.shape)}; with the config's "
                f"rank it must be {list(wanted)} on {self._layout.model_id}; the adapter was made "
                f"for {shown(self._config.base_model)}."
            )

    def _put_cuts(
        self,
        kind: str,
        tensor: TensorRef,
        parameter: str,
        experts: Experts,
        view: tuple[int, ...],
        index: Callable[[int, slice], Index],
    ) -> None:
        """Each linear's A [rank, in] or B [out, rank], where `index` has it in `view`."""
        rank, outs = self._config.rank_of(parameter), self._targets[experts[0][0]].out_features
        share = tensor.nbytes // (len(experts) * len(experts[0]))
        for expert, names in enumerate(experts):
            for place, name in enumerate(names):
                target = self._targets[name]
                shape = (rank, target.in_features) if kind == LORA_A else (outs, rank)
                cut = TensorCut(
                    tensor.name, tensor.dtype, shape, tensor.offset, share, tensor.file,
                    tensor, view, index(expert, slice(place * outs, (place + 1) * outs)),
                )  # fmt: skip
                self._put(name, {kind: cut}, parameter)

    def _put(self, target: str, tensors: dict[str, TensorRef], config_name: str) -> None:
        if target in self.modules and self._config_names.get(target) != config_name:
            raise AdapterUnservable(
                f"The adapter changes {target} twice: by itself, and with {config_name}."
            )
        self._config_names[target] = config_name
        self.modules.setdefault(target, {}).update(tensors)
