"""Verdict: whether one adapter's folder can be served."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is the sentence a request would be refused with; empty when it would be served."""

    path: str
    reason: str = ""
    rank: int | None = None  # the largest of any module
    num_modules: int | None = None
    target_modules: list[str] = field(default_factory=list)
    packed_bytes: int | None = None  # on the shard that has most
    digest: str = ""

    @property
    def is_served(self) -> bool:
        """Whether a server would load it."""
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"served": self.is_served}
