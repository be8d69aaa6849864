"""adapter_config.json: what we serve of peft's LoRA, and a sentence for what we do not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.patterns import ModulePatterns
from lorafleet.cache.strict_json import read_object

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 512

# Fields that change what the adapter computes; each is served only when absent or empty.
_UNSERVED_FIELDS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Starting points that leave the base weights as they are. The others train against changed ones.
_SERVED_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What of a LoRA's config decides its output."""

    base_model: str
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: ModulePatterns
    alpha_pattern: ModulePatterns

    def rank_of(self, module: str) -> int:
        """The rank peft gives this module."""
        rank: int = self.rank_pattern.get(module, self.rank)
        return rank

    def scale_of(self, module: str) -> float:
        """The factor on B(A(x)): alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank, alpha = self.rank_of(module), self.alpha_pattern.get(module, self.alpha)
        scale: float = alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return scale


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
        rank_pattern=ModulePatterns(
            "rank_pattern", {key: _rank("rank_pattern", value) for key, value in ranks.items()}
        ),
        alpha_pattern=ModulePatterns(
            "alpha_pattern", {key: _number("alpha_pattern", value) for key, value in alphas.items()}
        ),
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
    if config.get("bias") not in (None, "none"):
        raise AdapterUnservable(f'bias is {shown(config["bias"])}; only "none" is served.')
    init = config.get("init_lora_weights")
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
