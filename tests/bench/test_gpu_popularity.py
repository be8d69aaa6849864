"""The workloads of `make gpu`: how requests spread over adapters, and how long they are."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.bench.gpu.popularity import LAWS, adapter_counts, punica_requests


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_every_request_has_an_adapter(law: str, n: int) -> None:
    counts = adapter_counts(law, n)
    assert sum(counts) == n
    assert min(counts) > 0
    assert counts == sorted(counts, reverse=True)


def test_counts_of_1024_requests() -> None:
    assert adapter_counts("distinct", 1024) == [1] * 1024
    assert adapter_counts("uniform", 1024) == [32] * 32
    assert adapter_counts("identical", 1024) == [1024]
    skewed = adapter_counts("skewed", 1024)
    assert (len(skewed), skewed[:2]) == (16, [291, 194])


def test_an_unknown_law_is_named() -> None:
    with pytest.raises(ValueError, match="'zipf' is not one of distinct"):
        adapter_counts("zipf", 3)


def test_laws_differ_in_adapters_only() -> None:
    laws = {law: punica_requests(law, 100, 256) for law in LAWS}
    lengths = {
        law: [(each.prompt_tokens, each.output_tokens) for each in requests]
        for law, requests in laws.items()
    }
    assert all(each == lengths["distinct"] for each in lengths.values())
    popular = Counter(each.adapter for each in laws["uniform"])
    assert popular == dict.fromkeys(range(1, 11), 10)
    assert laws["skewed"] == punica_requests("skewed", 100, 256)


def test_a_request_stays_within_its_tokens() -> None:
    for each in punica_requests("distinct", 500, 64):
        assert each.prompt_tokens >= 1
        assert each.output_tokens >= 2
        assert each.prompt_tokens + each.output_tokens <= 64
