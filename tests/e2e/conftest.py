"""Checkpoints, adapters and oracle answers, made once per family and session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.e2e.questions import Family, make_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """A family's model and adapter folders, and what peft answers to the questions."""

    @cache
    def make(name: str) -> Family:
        return make_family(name, tmp_path_factory.mktemp(name))

    return make
