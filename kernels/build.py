"""The CUDA sources as one shared library: compiled by nvcc once, then loaded from a cache.

No torch headers are involved: every entry point is a C function over raw pointers that returns a
cudaError_t, so a build takes seconds and serves any torch. `python -m lorafleet.kernels.build
--arch 80 --arch 90` builds ahead of time, for an image whose machines have no nvcc.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from filelock import FileLock

_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC", "-Xptxas", "-v")
_NAME = "liblorafleet_kernels.so"
_ROOT = Path(__file__).parent


class KernelBuildError(RuntimeError):
    """nvcc refused a source; the message is nvcc's."""


class NvccMissing(RuntimeError):
    """No built library fits these sources and no nvcc is here to build one."""


def library_path(arch: int, root: Path = _ROOT) -> Path:
    """The built library for a compute capability such as 80 or 90, building it if need be.

    Looked for, and put, under LORAFLEET_KERNEL_DIR or ~/.cache/lorafleet/kernels. Raises
    KernelBuildError, NvccMissing.
    """
    sources = sorted(root.rglob("*.cu"))
    default = Path.home() / ".cache" / "lorafleet" / "kernels"
    base = Path(os.environ.get("LORAFLEET_KERNEL_DIR", default))
    target = base / _fingerprint(sorted(root.rglob("*.cu*")), arch) / _NAME
    if target.exists():
        return target
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise NvccMissing(f"the CUDA kernels are not built ({target}) and there is no nvcc")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            _build(nvcc, sources, arch, target)
    return target


def build_log(path: Path) -> str:
    """What ptxas said of a built library: registers, shared memory and spills by kernel."""
    return path.with_suffix(".log").read_text()


@cache
def library() -> ctypes.CDLL:
    """The library for the present device. Raises KernelBuildError, NvccMissing."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return ctypes.CDLL(str(library_path(10 * major + minor)))


def bind(name: str, *argtypes: type) -> Callable[..., None]:
    """The entry point `name`; what it returns raises RuntimeError on a CUDA error."""
    function = getattr(library(), name)
    function.argtypes, function.restype = list(argtypes), ctypes.c_int
    describe = library().lorafleet_error_string
    describe.argtypes, describe.restype = [ctypes.c_int], ctypes.c_char_p

    def call(*args: object) -> None:
        status = function(*args)
        if status:
            raise RuntimeError(f"{name}: {describe(status).decode()}")

    return call


def _fingerprint(files: Sequence[Path], arch: int) -> str:
    digest = hashlib.sha256(repr((_FLAGS, _codes(arch))).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def _build(nvcc: str, sources: Sequence[Path], arch: int, target: Path) -> None:
    codes = _codes(arch)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [nvcc, *_FLAGS, *codes, "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            logs = list(threads.map(_run, commands))
        linked = Path(folder) / _NAME
        logs.append(_run([nvcc, "-shared", *codes, *map(str, objects), "-o", str(linked)]))
        target.with_suffix(".log").write_text("\n".join(logs))
        os.replace(linked, target)


def _codes(arch: int) -> list[str]:
    exact = "90a" if arch == 90 else str(arch)  # with Hopper's products of a warp group
    return [f"-gencode=arch=compute_{exact},code=sm_{exact}"]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelBuildError(done.stderr or done.stdout)
    return done.stderr


def main() -> None:
    """Builds and says where."""
    parser = ArgumentParser("python -m lorafleet.kernels.build", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", required=True, help="80, 89, 90 ...")
    for arch in parser.parse_args().arch:
        path = library_path(arch)
        print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
