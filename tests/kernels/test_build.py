"""The CUDA sources compile where nvcc is, without a device."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from lorafleet.kernels import build
from lorafleet.kernels.build import KernelBuildError, NvccMissing, build_log, library_path

ENTRIES = (
    "lorafleet_decode_attention",
    "lorafleet_greedy",
    "lorafleet_lora_expand",
    "lorafleet_lora_shrink_tiles",
    "lorafleet_lora_expand_tiles",
    "lorafleet_lora_shrink",
    "lorafleet_rms_norm",
    "lorafleet_rotary_and_store",
    "lorafleet_silu_mul",
    "lorafleet_stream_linear",
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture
def kernel_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFLEET_KERNEL_DIR", str(tmp_path / "built"))
    return tmp_path / "built"


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_every_architecture_from_one_source_without_spills(
    arch: int, kernel_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = library_path(arch)
    library = ctypes.CDLL(str(path))
    assert all(hasattr(library, name) for name in ENTRIES)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", build_log(path))
    assert len(spills) >= len(ENTRIES)
    assert set(spills) == {("0", "0")}
    exact = "90a" if arch == 90 else arch  # else there are no products of warp groups
    assert f"for 'sm_{exact}'" in build_log(path)
    monkeypatch.setenv("PATH", "")  # what is built needs no compiler
    assert library_path(arch) == path


@needs_nvcc
def test_a_refused_source_shows_the_compilers_words(kernel_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("__global__ void k() { undeclared(); }")
    with pytest.raises(KernelBuildError, match="undeclared"):
        library_path(90, root=tmp_path)


@needs_nvcc
def test_what_is_built_ahead_is_found_by_each_device(
    kernel_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.cu").write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(build, "library_path", partial(library_path, root=tmp_path))
    monkeypatch.setattr(sys, "argv", ["build", "--arch", "80", "--arch", "90"])
    build.main()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert library_path(80, root=tmp_path) != library_path(90, root=tmp_path)
    with pytest.raises(NvccMissing):
        library_path(89, root=tmp_path)


def test_without_a_compiler_the_missing_library_is_named(
    kernel_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(NvccMissing, match=str(kernel_dir)):
        library_path(90)
