"""Which blocks decode attention takes, on devices that are not here."""

from __future__ import annotations

import pytest
import torch

from lorafleet.kernels.decode_attention import op

HOPPER, SMALL = 227 << 10, 99 << 10  # shared memory of a block; the second is an L4's
WARP_BYTES = 3 * 2 * 16 * 136 * 2  # as attention.cu has it for heads of 128
DEVICE = torch.device("cpu")


@pytest.mark.parametrize("shared", [HOPPER, SMALL])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("units", [1, 8, 33, 264, 265, 2048])
def test_blocks_fit_and_fill_the_device(
    shared: int, head_dim: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "shared_bytes", lambda device: shared)
    for max_pages in (1, 3, 56, 64, 8192):
        warps, chunks, least = op._cut(units, max_pages, head_dim, DEVICE)
        assert warps * WARP_BYTES <= shared or head_dim == 64
        assert 1 <= chunks <= max_pages
        assert least >= warps
        if units <= 264:
            assert units * chunks <= 264
            assert warps == (2 if (shared, head_dim) == (SMALL, 128) else 4)


def test_among_many_units_only_long_rows_may_be_cut() -> None:
    assert op._cut(512, 127, 128, DEVICE) == (2, 1, 64)
    assert op._cut(512, 128, 128, DEVICE) == (2, 2, 64)
    assert op._cut(512, 8192, 128, DEVICE) == (2, 4, 64)
