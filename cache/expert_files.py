"""LoRA on mixtures of experts, from the forms peft saves to one A and one B per expert's linear.

- `...experts.3.w1.lora_A.weight`: adapters of single linears, from before transformers 5. They are
  named as the layout's targets are; nothing is left to do.
- `target_parameters` with `experts.gate_up_proj` or `experts.down_proj`: one A [experts * rank, in]
  and one B [out, rank * experts] for all of a layer's experts. A's rows run over an expert's ranks
  first, B's columns over the experts first (peft 0.21, `ParamWrapper.get_delta_factors`). peft
  wraps gate_up_proj first, so that with both it is `...experts.base_layer`, else `...experts`.
- `mlp.gate`: the router, by the name it has since transformers 5.
"""

from __future__ import annotations

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.layout import ModelLayout, MoeLayer
from lorafleet.cache.linear_tensors import LORA_A, LORA_B
from lorafleet.cache.peft_config import PeftConfig, ends_of
from lorafleet.cache.safetensors_file import TensorCut, TensorRef

Modules = dict[str, dict[str, TensorRef]]  # module name -> its tensors by kind


_PARAMETERS = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")


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

    def _unfold(
        self, kind: str, tensor: TensorRef, parameter: str, experts: list[tuple[str, ...]]
    ) -> None:
        """Cuts one tensor of all experts; `experts` names each one's targets, outputs in order."""
        rank, first = self._config.rank_of(parameter), self._targets[experts[0][0]]
        outs = len(experts[0]) * first.out_features
        width = rank * len(experts)
        wanted = (width, first.in_features) if kind == LORA_A else (outs, width)
        if tensor.shape != wanted:
            raise AdapterUnservable(
                f"{kind} of {parameter} has shape {list(tensor.shape)}; with the config's "
                f"rank it must be {list(wanted)} on {self._layout.model_id}; the adapter was made "
                f"for {shown(self._config.base_model)}."
            )
        for expert, names in enumerate(experts):
            for part, name in enumerate(names):
                places = (expert, len(experts)), (part, len(names))
                self._put(name, {kind: _cut(kind, tensor, rank, *places)}, parameter)

    def _put(self, target: str, tensors: dict[str, TensorRef], config_name: str) -> None:
        if target in self.modules and self._config_names.get(target) != config_name:
            raise AdapterUnservable(
                f"The adapter changes {target} twice: by itself, and with {config_name}."
            )
        self._config_names[target] = config_name
        self.modules.setdefault(target, {}).update(tensors)


def _cut(
    kind: str, tensor: TensorRef, rank: int, expert: tuple[int, int], part: tuple[int, int]
) -> TensorCut:
    """One target's A [rank, in] or B [out, rank]; `expert` and `part` each with their number."""
    number, num_experts = expert
    rows, columns = tensor.shape
    view, shape = (num_experts, rank, columns), (rank, columns)
    index: tuple[int | slice, ...] = (number,)
    if kind == LORA_B:
        out_features = rows // part[1]
        outputs = slice(part[0] * out_features, (part[0] + 1) * out_features)
        view, shape = (rows, rank, num_experts), (out_features, rank)
        index = (outputs, slice(None), number)
    share = tensor.nbytes // (num_experts * part[1])
    return TensorCut(
        tensor.name, tensor.dtype, shape, tensor.offset, share, tensor.file, tensor, view, index
    )
