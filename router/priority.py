"""Priority: which of the waiting requests go first."""

from __future__ import annotations

from lorafleet.router.fields import Fields

LOWEST, HIGHEST = 100, -100  # a lower number is served first, as in vLLM


def read_priority(fields: Fields) -> int:
    """From `priority`, 0 where there is none. Raises InvalidRequest with the range."""
    return fields.integer("priority", 0, HIGHEST, LOWEST)
