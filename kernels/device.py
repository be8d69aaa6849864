"""What of a CUDA device the choice of a kernel depends on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    found: int = properties.shared_memory_per_block_optin
    return found
