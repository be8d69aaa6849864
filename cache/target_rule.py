"""TargetRule: which modules a config says it adapts, by the rule of peft's tuners_utils.py.

What an adapter does is what its tensors say. peft makes layers by the config and passes over
tensors of others, though, so that tensors outside the rule are a sign of a wrong config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.patterns import name_pattern

_ALL_LINEAR = "all-linear"
_LAYER = re.compile(r"\.([^.]*)\.(\d+)\.")
_PLAIN = re.compile(r"\w+", re.ASCII)


class TargetRule:
    """`target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern`.

    A regular expression that cannot be matched safely leaves nothing out.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises AdapterUnservable naming the field that is malformed."""
        targets = config.get("target_modules")
        if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
            targets = None
        self._targets = _Names("target_modules", targets)
        self._excluded = _Names("exclude_modules", config.get("exclude_modules") or None)
        self._layers = _integers("layers_to_transform", config.get("layers_to_transform"))
        self._patterns = _strings("layers_pattern", config.get("layers_pattern") or None)

    def left_out_by(self, module: str) -> str:
        """The field that leaves out a module, such as `model.layers.0.mlp.up_proj`; "" for none."""
        if self._excluded.match(module, default=False):
            return "exclude_modules"
        if not self._targets.match(module, default=True):
            return "target_modules"
        # peft looks at layers only where a list names modules by the ends of their names.
        if self._layers and self._targets.is_suffix_of(module) and not self._is_in_layers(module):
            return "layers_to_transform"
        return ""

    def _is_in_layers(self, module: str) -> bool:
        names = self._patterns or ()
        if not all(_PLAIN.fullmatch(name) for name in names):
            return True
        found = (m for m in _LAYER.finditer(f".{module}") if not names or m[1] in names)
        layer = next(found, None)
        return layer is not None and int(layer[2]) in self._layers


class _Names:
    """A list of module names or ends of names, or a regular expression of whole names."""

    def __init__(self, field: str, value: Any) -> None:
        self._pattern = name_pattern(field, value) if isinstance(value, str) else None
        self._names = None if isinstance(value, str) else _strings(field, value)

    def match(self, module: str, default: bool) -> bool:
        """Whether the module is named; `default` where nothing can tell."""
        if self._pattern is not None:
            return self._pattern.fullmatch(module) is not None
        if self._names is None:
            return default
        return module in self._names or self.is_suffix_of(module)

    def is_suffix_of(self, module: str) -> bool:
        """Whether a list names the end of the module's name, and not all of it."""
        names = self._names or ()
        return module not in names and any(module.endswith(f".{name}") for name in names)


def _strings(field: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterUnservable(
            f"{field} is {shown(value)}; it must be a string or a list of them."
        )
    return tuple(names)


def _integers(field: str, value: Any) -> frozenset[int]:
    numbers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise AdapterUnservable(f"{field} is {shown(value)}; it must be an integer or a list.")
    return frozenset(numbers)
