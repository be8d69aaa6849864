"""LastTokens: the tokens of a step whose last hidden states somebody reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorafleet.kernels.lora.op import LoraBatch


class LastTokens(NamedTuple):
    """Of a prompt that is its last token alone: what the last layer does after attention is only
    worth doing for these. `tokens`: int64 [n] of the step's. `lora`: of these n alone.
    """

    tokens: torch.Tensor
    lora: LoraBatch
