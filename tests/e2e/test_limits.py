"""Token for token, with the limits of the service made tight, together and a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.questions import Family, ask_all
from tests.e2e.service import serve

Families = Callable[[str], Family]


# Windows and soft caps, and experts: what the limits could go wrong with beside llama's layers,
# which have them apart.
_TIGHT = ("gemma2", "mixtral")


@pytest.mark.parametrize("name", _TIGHT)
async def test_small_chunks_few_pages_and_two_slots_change_nothing(
    family: Families, name: str, tmp_path: Path
) -> None:
    made = family(name)
    flags = ("--num-shard=2", f"--adapter-root={made.adapter_root}", "--prefill-chunk-tokens=7")
    tight = ("--kv-pages=18", "--max-active-adapters=2")
    with serve(made.model, tmp_path, *flags, *tight) as service:
        answers = await ask_all(service, made.questions)
        assert answers == [question.answer for question in made.questions]
        assert service.metric("lorafleet_preemptions_total") > 0
        assert service.metric("lorafleet_adapter_evictions_total", tier="device") > 0


@pytest.mark.parametrize(
    ("limits", "happened"),
    [
        (("--kv-pages=12",), "lorafleet_preemptions_total"),
        (("--max-batch-prefill-tokens=7", "--no-prefix-caching"), None),
        (("--max-batch-size=3", "--max-active-adapters=2"), "lorafleet_adapter_evictions_total"),
    ],
)
async def test_limits_change_no_token(
    family: Families, limits: tuple[str, ...], happened: str | None, tmp_path: Path
) -> None:
    made = family("llama")
    flags = ("--num-shard=1", f"--adapter-root={made.adapter_root}", *limits)
    with serve(made.model, tmp_path, *flags) as service:
        answers = await ask_all(service, made.questions)
        assert answers == [question.answer for question in made.questions]
        if happened is not None:
            assert service.metric(happened) > 0
