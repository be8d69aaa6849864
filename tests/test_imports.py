"""What must run where torch is not installed does, module by module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("proto", "kernels", "cache", "router", "shard", "client", "deploy")
LEDGERS = (
    "pages", "prefix", "slots", "layout", "errors", "merging.recipe", "sources.local_id",
)  # fmt: skip
LAUNCHER = ("cli", "serve", "launch", "child", "screen", "banner", "resources")
IMPORT_WITHOUT_TORCH = """
import sys
from importlib import import_module
for name in ("torch", "transformers", "safetensors", "huggingface_hub"):
    sys.modules[name] = None  # importing it raises ImportError
for name in sys.argv[1:]:
    import_module(name)
"""


def modules(folder: str) -> list[str]:
    paths = sorted(path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")
    return [f"lorafleet.{folder}.{path.stem}" for path in paths]


def import_without_torch(names: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", IMPORT_WITHOUT_TORCH, *names]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(modules("router"), id="router"),
        pytest.param([f"lorafleet.cache.{name}" for name in LEDGERS], id="ledgers"),
        pytest.param([f"lorafleet.deploy.{name}" for name in LAUNCHER], id="launcher"),
    ],
)
def test_runs_without_torch(names: list[str]) -> None:
    done = import_without_torch(names)
    assert done.returncode == 0, done.stderr


def test_torch_would_be_noticed() -> None:
    assert import_without_torch(["lorafleet.cache.packing"]).returncode != 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_package_files_are_docstrings_only(folder: str) -> None:
    paths = list((ROOT / folder).rglob("__init__.py"))
    assert paths
    for path in paths:
        text = path.read_text().strip()
        assert text.startswith('"""'), path
        assert text.endswith('"""'), path
        assert text.count('"""') == 2, path
