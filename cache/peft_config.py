"""adapter_config.json: what we serve of peft's LoRA, and a sentence for what we do not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.patterns import ModulePatterns
from lorafleet.cache.strict_json import read_object
from lorafleet.cache.target_rule import TargetRule
from lorafleet.cache.vocabulary_config import VocabularyConfig, parse_vocabulary
from lorafleet.cache.weight_files import CONFIG_FILE

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 512

# Fields that change what the adapter computes; each is served only when absent or empty.
_UNSERVED_FIELDS = (
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# Fields of peft's names for variants of LoRA that change training alone, or are served.
_SERVED_FIELDS = (
    "use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "runtime_config",
)  # fmt: skip
_VARIANT_FIELD = re.compile(r"use_\w+|\w+_config")
_BIASES = (None, "none", "all", "lora_only")
# Starting points that leave the base weights as they are. The others train against changed ones.
_SERVED_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What of a LoRA's config decides its output."""

    base_model: str
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    targets: TargetRule
    rank_pattern: ModulePatterns
    alpha_pattern: ModulePatterns
    vocabulary: VocabularyConfig
    target_parameters: frozenset[str] = frozenset()

    def rank_of(self, module: str) -> int:
        """The rank peft gives this module or parameter."""
        rank: int = self.rank_pattern.get(self._pattern_name(module), self.rank)
        return rank

    def targets_parameter(self, name: str) -> bool:
        """Whether `target_parameters` has this name, or an end of it after a dot."""
        return not self.target_parameters.isdisjoint(ends_of(name))

    def targets_weight_of(self, name: str) -> bool:
        """Whether `target_parameters` has this parameter, or the weight of this module."""
        return self.targets_parameter(name) or self.targets_parameter(f"{name}.weight")

    def _pattern_name(self, module: str) -> str:
        weight = f"{module}.weight"
        return weight if self.targets_parameter(weight) else module

    def scale_of(self, module: str) -> float:
        """The factor on B(A(x)): alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = self.alpha_pattern.get(self._pattern_name(module), self.alpha)
        rank = self.rank_of(module)
        scale: float = alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return scale


def ends_of(name: str) -> Iterator[str]:
    """A dotted name and what of it is left after each of its dots, shortest first."""
    return accumulate(reversed(name.split(".")), lambda end, part: f"{part}.{end}")


def parse_config(data: bytes) -> PeftConfig:
    """Raises AdapterUnservable, naming the field, for anything but a LoRA served exactly."""
    check_config_size(len(data))
    config = read_object(CONFIG_FILE, data)
    _refuse_unserved(config)
    ranks = _object(config, "rank_pattern")
    alphas = _object(config, "alpha_pattern")
    return PeftConfig(
        base_model=str(config.get("base_model_name_or_path") or "an unnamed base model"),
        rank=_rank("r", config.get("r", 8)),
        alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=_bool(config, "use_rslora"),
        use_dora=_bool(config, "use_dora"),
        lora_bias=_bool(config, "lora_bias"),
        targets=TargetRule(config),
        rank_pattern=ModulePatterns(
            "rank_pattern", {key: _rank("rank_pattern", value) for key, value in ranks.items()}
        ),
        alpha_pattern=ModulePatterns(
            "alpha_pattern", {key: _number("alpha_pattern", value) for key, value in alphas.items()}
        ),
        target_parameters=_strings(config, "target_parameters"),
        vocabulary=parse_vocabulary(config),
    )


def check_config_size(nbytes: int) -> None:
    """Raises AdapterUnservable for a config no adapter needs."""
    if nbytes > MAX_CONFIG_BYTES:
        raise AdapterUnservable(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes.")


def _refuse_unserved(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterUnservable(
            f"peft_type is {shown(config.get('peft_type'))}; only LORA is served."
        )
    for field in _UNSERVED_FIELDS:
        if config.get(field):
            raise AdapterUnservable(f"{field} is set, which is not served.")
    for field in config:
        if _VARIANT_FIELD.fullmatch(field) and field not in _SERVED_FIELDS and config[field]:
            raise AdapterUnservable(
                f"{shown(field)} is set, which by its name changes what the adapter computes and "
                "is not known here."
            )
    if config.get("bias") not in _BIASES:
        raise AdapterUnservable(
            f'bias is {shown(config["bias"])}; it must be "none", "all" or "lora_only".'
        )
    if config.get("use_dora") and config.get("lora_bias"):
        raise AdapterUnservable("lora_bias is set beside use_dora, which peft does not define.")
    init = config.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else init  # as peft does
    if not any(
        init is served or (isinstance(init, str) and init == served) for served in _SERVED_INITS
    ):
        raise AdapterUnservable(
            f"init_lora_weights is {shown(init)}, which trains against changed base weights; "
            "convert the adapter to a plain LoRA to serve it."
        )


def _object(config: dict[str, Any], field: str) -> dict[str, Any]:
    value = config.get(field)
    if value is not None and not isinstance(value, dict):
        raise AdapterUnservable(f"{field} is {shown(value)}; it must be an object.")
    return value or {}


def _strings(config: dict[str, Any], field: str) -> frozenset[str]:
    value = config.get(field)
    if value is not None and not (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ):
        raise AdapterUnservable(f"{field} is {shown(value)}; it must be a list of strings.")
    return frozenset(value or ())


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterUnservable(
            f"{field} holds {shown(value)}; ranks must be integers between 1 and {MAX_RANK}."
        )
    return value


def _number(field: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise AdapterUnservable(f"{field} holds {shown(value)}; it must be a finite number.")
    return number


def _bool(config: dict[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and type(value) is not bool:
        raise AdapterUnservable(f"{field} is {shown(value)}; it must be true or false.")
    return bool(value)
