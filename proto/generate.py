"""Generates `shard_pb2*` beside `shard.proto`: `python proto/generate.py`, or while packaging.

The three generated files are not in version control but ship in wheels and source archives, so an
install from either needs no protoc. This file imports nothing of the project: it runs before the
project can be imported.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKAGE = "lorafleet/proto"
GENERATED = ("shard_pb2.py", "shard_pb2.pyi", "shard_pb2_grpc.py")


def generate() -> None:
    """Runs protoc so that the generated modules import each other as `lorafleet.proto`.

    Raises RuntimeError when protoc refuses the file or grpcio-tools is not installed.
    """
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise RuntimeError(f"grpcio-tools is needed to generate {HERE}/shard_pb2.py") from error
    with TemporaryDirectory(dir=HERE) as out:
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        include = f"-I{PACKAGE}={HERE}"
        if protoc.main(["protoc", include, *outputs, f"{PACKAGE}/shard.proto"]) != 0:
            raise RuntimeError(f"protoc refused {HERE}/shard.proto")
        for name in GENERATED:
            Path(out, PACKAGE, name).replace(HERE / name)


class BuildPy(build_py):
    """Packaging step: generates what a fresh checkout lacks, then collects the modules."""

    def run(self) -> None:
        if not all((HERE / name).exists() for name in GENERATED):
            generate()
        super().run()


if __name__ == "__main__":
    generate()
