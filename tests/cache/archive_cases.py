"""Archives of adapters, good ones and every kind that is refused."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.cache.adapter_cases import write_adapter

CONFIG, WEIGHTS = FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_files(directory: Path) -> dict[str, bytes]:
    """An adapter's files by name, written to `directory` first."""
    write_adapter(directory)
    return {name: (directory / name).read_bytes() for name in FILES}


def tar_of(files: Mapping[str, bytes], *extra: tarfile.TarInfo, level: int = 6) -> bytes:
    """A tar.gz; `extra` are members without content."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=level) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return packed.getvalue()


def zip_of(files: Mapping[str, bytes], *extra: zipfile.ZipInfo) -> bytes:
    """A deflated zip; `extra` are members with the content "x"."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for info in extra:
            archive.writestr(info, "x")
    return packed.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A tar member that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_special(name: str, mode: int) -> zipfile.ZipInfo:
    """A zip member with a Unix mode."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def huge_header() -> bytes:
    """A tar whose extended header claims to be of a gigabyte."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 22))


Files = Mapping[str, bytes]
Case = tuple[
    Callable[[Files], bytes], str
]  # an adapter's files to an archive; words of the refusal

REFUSED: dict[str, Case] = {
    "tar: absolute path": (lambda f: tar_of({**f, "/etc/x": b"x"}), "leads out of it"),
    "tar: parent": (lambda f: tar_of({**f, "a/../../x": b"x"}), "leads out of it"),
    "tar: symbolic link": (
        lambda f: tar_of(f, special("l", tarfile.SYMTYPE, "/etc/passwd")),
        "neither a file nor a directory",
    ),
    "tar: weights are a link": (
        lambda f: tar_of({CONFIG: f[CONFIG]}, special(WEIGHTS, tarfile.SYMTYPE, "/etc/passwd")),
        "neither a file nor a directory",
    ),
    "tar: hard link": (
        lambda f: tar_of(f, special("l", tarfile.LNKTYPE, CONFIG)),
        "neither a file nor a directory",
    ),
    "tar: device": (
        lambda f: tar_of(f, special("null", tarfile.CHRTYPE)),
        "neither a file nor a directory",
    ),
    "tar: fifo": (lambda f: tar_of(f, special("p", tarfile.FIFOTYPE)), "neither a file"),
    "tar: absurd ratio": (lambda f: tar_of({**f, "zeros": bytes(30 << 20)}), "bytes in it"),
    "tar: too much in it": (lambda f: tar_of({**f, "x": bytes(70 << 20)}, level=0), "bytes in it"),
    "tar: many files": (
        lambda f: tar_of({**f, **{str(n): b"" for n in range(1000)}}),
        "more than 1000 files",
    ),
    "tar: absurd header": (lambda f: huge_header(), "absurd size|corrupt"),
    "tar: cut short": (lambda f: tar_of(f)[:-100], "corrupt"),
    "tar: bad checksum": (lambda f: tar_of(f)[:-8] + b"\0\0\0\0" + tar_of(f)[-4:], "corrupt"),
    "tar: two of a name": (
        lambda f: gzip.compress(_twice(gzip.decompress(tar_of(f)))),
        "several files of one name",
    ),
    "tar: no weights": (lambda f: tar_of({CONFIG: f[CONFIG]}), f"no {WEIGHTS}"),
    "tar: no config": (lambda f: tar_of({WEIGHTS: f[WEIGHTS]}), f"no {CONFIG}"),
    "tar: pickle": (
        lambda f: tar_of({CONFIG: f[CONFIG], "adapter_model.bin": b"x"}),
        f"no {WEIGHTS}",
    ),
    "tar: two adapters": (
        lambda f: tar_of({f"{d}/{n}": c for d in "ab" for n, c in f.items()}),
        "several adapters",
    ),
    "tar: too deep": (lambda f: tar_of({f"a/b/{n}": c for n, c in f.items()}), f"no {CONFIG}"),
    "zip: parent": (lambda f: zip_of({**f, "../x": b"x"}), "leads out of it"),
    "zip: absolute path": (lambda f: zip_of({**f, "/x": b"x"}), "leads out of it"),
    "zip: backslashes": (lambda f: zip_of({**f, "..\\x": b"x"}), "leads out of it"),
    "zip: drive": (lambda f: zip_of({**f, "C:x": b"x"}), "leads out of it"),
    "zip: symbolic link": (lambda f: zip_of(f, zip_special("l", 0o120777)), "neither a file"),
    "zip: device": (lambda f: zip_of(f, zip_special("d", 0o020666)), "neither a file"),
    "zip: absurd ratio": (lambda f: zip_of({**f, "zeros": bytes(30 << 20)}), "bytes in it"),
    "zip: cut short": (lambda f: zip_of(f)[:-100], "corrupt"),
    "zip: bad checksum": (lambda f: _with_bad_crc(f), "corrupt"),
    "zip: many files": (
        lambda f: zip_of({**f, **{str(n): b"" for n in range(1000)}}),
        "more than 1000 files",
    ),
    "zip: no config": (lambda f: zip_of({WEIGHTS: f[WEIGHTS]}), f"no {CONFIG}"),
    "neither": (lambda f: b"<html>not found</html>", "neither a tar.gz nor a zip"),
    "nothing": (lambda f: b"", "neither a tar.gz nor a zip"),
}


def _twice(tar: bytes) -> bytes:
    """The members of an uncompressed tar two times over."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        end = max(m.offset_data + (m.size + 511) // 512 * 512 for m in archive.getmembers())
    return tar[:end] * 2 + bytes(1024)


def _with_bad_crc(files: Files) -> bytes:
    """A zip of stored files with one bit of the weights flipped."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    data = bytearray(packed.getvalue())
    data[data.index(files[WEIGHTS]) + 500] ^= 1
    return bytes(data)
