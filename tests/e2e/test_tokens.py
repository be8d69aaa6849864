"""Token for token: what the service answers is what transformers + peft answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import FAMILIES, has_experts
from tests.e2e.questions import Family, ask_all
from tests.e2e.service import serve

Families = Callable[[str], Family]


# Two shards hold what one has besides; experts on two are in the test after this one.
_PLACES = [("llama", 1), *((name, 1 if has_experts(name) else 2) for name in FAMILIES)]


@pytest.mark.parametrize(("name", "num_shard"), _PLACES)
async def test_mixed_batch_equals_peft(
    family: Families, name: str, num_shard: int, tmp_path: Path
) -> None:
    made = family(name)
    answers = [question.answer for question in made.questions]
    flags = (f"--num-shard={num_shard}", f"--adapter-root={made.adapter_root}")
    with serve(made.model, tmp_path, *flags) as service:
        assert await ask_all(service, made.questions) == answers
        assert service.metric("lorafleet_step_adapters_max") > 1
        cold_hits = service.metric("lorafleet_prefix_hit_tokens_total")
        assert await ask_all(service, made.questions) == answers
        warm_hits = service.metric("lorafleet_prefix_hit_tokens_total") - cold_hits
        assert warm_hits >= len(answers) * 32  # two full pages of each prompt's shared beginning
