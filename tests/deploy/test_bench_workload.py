"""Popularity laws, lengths and arrivals of the benchmark."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random

import pytest

from lorafleet.deploy.bench.workload import Length, Popularity, Workload, poisson

ADAPTERS = tuple(f"a{i}" for i in range(10))


def draw(law: str, count: int = 4000) -> Counter[str]:
    return Counter(Popularity.parse(law).draw(ADAPTERS, count, Random(1)))


def test_distinct_takes_each_adapter_in_turn() -> None:
    drawn = Popularity.parse("distinct").draw(ADAPTERS, 12, Random(1))
    assert drawn == [*ADAPTERS, "a0", "a1"]


def test_identical_asks_for_one() -> None:
    assert draw("identical") == {"a0": 4000}


def test_uniform_takes_the_ceiling_of_the_square_root() -> None:
    drawn = draw("uniform")
    assert set(drawn) == {"a0", "a1", "a2", "a3"}
    assert all(900 < count < 1100 for count in drawn.values())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_uniform_is_exact_at_squares(n: int, k: int) -> None:
    assert len(Popularity.parse("uniform").weights(n)) == k


def test_zipf_follows_its_law() -> None:
    drawn = draw("zipf:1.0", 20000)
    harmonic = sum(1 / i for i in range(1, 11))
    for rank, name in enumerate(ADAPTERS, start=1):
        assert drawn[name] == pytest.approx(20000 / harmonic / rank, rel=0.15)


@pytest.mark.parametrize("text", ["", "zipf", "zipf:x", "uniform:2", "popular"])
def test_an_unknown_law_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"zipf|convert"):
        Popularity.parse(text)


def test_lengths() -> None:
    assert Length.parse("128") == Length(128, 128)
    drawn = {Length.parse("3,5").draw(Random(seed)) for seed in range(50)}
    assert drawn == {3, 4, 5}
    assert (str(Length(3, 5)), str(Length(3, 3))) == ("3,5", "3")


@pytest.mark.parametrize("text", ["0", "5,3", "1,2,3", "x"])
def test_a_wrong_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"length|literal"):
        Length.parse(text)


def test_poisson_arrivals_have_the_rate_and_only_grow() -> None:
    times = poisson(50.0, 5000, Random(2))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100.0, rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.1)  # an exponential's deviation is its mean


def workload(seed: int) -> Workload:
    return Workload(
        ADAPTERS, Popularity.parse("zipf:1"), 20, Length(10, 20), Length(4, 8), 5.0, seed
    )


def test_a_seed_decides_everything() -> None:
    assert workload(3).asks(1.5) == workload(3).asks(1.5)
    assert workload(3).asks(1.5) != workload(4).asks(1.5)


def test_prompts_are_as_long_as_asked_for() -> None:
    lengths = [len(str(ask.prompt).split()) * 2.0 for ask in workload(3).asks(2.0)]
    assert all(9 <= length <= 21 for length in lengths)
    assert all(4 <= ask.output_tokens <= 8 for ask in workload(3).asks(2.0))
