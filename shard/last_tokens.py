"""LastTokens: the tokens of a step whose last hidden states somebody reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorafleet.kernels.lora.op import LoraBatch


class LastTokens(NamedTuple):
    """A prompt has one, its last: for the others the last layer need do nothing after attention.

    `tokens`: int64 [n], which of the step's. `lora`: of these n alone.
    """

    tokens: torch.Tensor
    lora: LoraBatch
