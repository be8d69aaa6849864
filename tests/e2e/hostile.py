"""Adapters made to do harm, from a seed: folders that lie, and archives that lead out."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import socket
import stat
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.cache.archive_cases import CONFIG, FILES, REFUSED, WEIGHTS, tar_of, zip_of
from tests.fake_tokenizer import tokenizer_json

Header = dict[str, Any]
_GIGABYTE = 10**9


@dataclass(frozen=True)
class Hostile:
    """An adapter as it is asked for, and words of the refusal that is wanted."""

    name: str
    source: str
    id: str
    words: str  # a regular expression


@dataclass(frozen=True)
class Good:
    """A servable adapter's files, taken apart."""

    folder: Path

    @property
    def files(self) -> dict[str, bytes]:
        """Config and weights by name."""
        return {name: (self.folder / name).read_bytes() for name in FILES}

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config."""
        config: dict[str, Any] = json.loads(self.files[CONFIG])
        return config

    def parts(self) -> tuple[Header, bytes]:
        """The weights' header, without metadata, and their data."""
        content = self.files[WEIGHTS]
        size = int.from_bytes(content[:8], "little")
        header: Header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        return header, content[8 + size :]

    def copy(self, folder: Path) -> Path:
        """The adapter once more."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


def weights(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; `length` is what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# Each makes one hostile adapter of a good one's copy, and returns words of its refusal.
Damage = Callable[[Random, Good, Path], str]
Put = Callable[[str, bytes], None]  # makes an object of a key and its content


def _cut(random: Random, good: Good, folder: Path) -> str:
    name = random.choice(FILES)
    content = good.files[name]
    (folder / name).write_bytes(content[: random.randrange(len(content) - 1)])
    return "is corrupt|is not valid JSON"


def _absurd_header_length(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    length = random.choice([10 * _GIGABYTE, 1 << 63, (1 << 64) - 1, len(data) * 2, 1 << 40])
    (folder / WEIGHTS).write_bytes(weights(header, data, length))
    return "header is cut short or too long"


def _header_of_rubbish(random: Random, good: Good, folder: Path) -> str:
    rubbish = [
        random.randbytes(random.randrange(1, 4000)),
        b'{"a":' + b"[" * random.randrange(10_000, 1_000_000),
        b'{"a":' * random.randrange(10_000, 100_000),
        b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
        b'["a"]',
        b"null",
        json.dumps(good.parts()[0]).encode("utf-16"),
        b'{"' + b"9" * 100_000 + b'":1e999999}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    ]
    (folder / WEIGHTS).write_bytes(weights(random.choice(rubbish), good.parts()[1]))
    return "is corrupt"


def _names_that_are_no_text(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    text, name = json.dumps(header).encode(), random.choice(list(header)).encode()
    worse = random.choice(
        [b"\xff\xfe", b"\xc3", b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"A" * 999]
    )
    (folder / WEIGHTS).write_bytes(weights(text.replace(name, name[:9] + worse), data))
    return "is corrupt|is not one that is served"


def _doubled_names(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    name = random.choice(list(header))
    entry = json.dumps({name: header[name]}).encode()[1:-1]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(weights(text[:-1] + b", " + entry + b"}", data))
    return "twice"


def _doubled_config_keys(random: Random, good: Good, folder: Path) -> str:
    text = json.dumps(good.config)[:-1]
    field = random.choice(['"r": 4', '"peft_type": "LORA"', '"lora_alpha": 1e3'])
    (folder / CONFIG).write_text(f"{text}, {field}}}")
    return f"{CONFIG} .*twice"


def _wild_offsets(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    entry = header[random.choice(list(header))]
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = random.choice(
        [[start + 4, stop + 4], [max(0, start - 4), stop], [-4, stop], [start, 1 << 70],
         [start], [float(start), stop], [True, stop], "0", None, [stop + 1, start],
         [start + len(data), stop + len(data)], [start, stop, stop]]
    )  # fmt: skip
    (folder / WEIGHTS).write_bytes(weights(header, data))
    return "is corrupt"


def _same_bytes_for_all(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    for entry in header.values():
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = [0, stop - start]
    (folder / WEIGHTS).write_bytes(weights(header, data))
    return "overlap or leave gaps"


def _more_at_the_end(random: Random, good: Good, folder: Path) -> str:
    with (folder / WEIGHTS).open("ab") as file:
        file.truncate(random.choice([1, 4096, 10 * _GIGABYTE]) + file.tell())
    return "is corrupt"


def _lying_type(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    dtype = random.choice(["F16", "F64", "I32", "U32", "F8_E4M3", "BF17", "", "O", 7, None])
    header[random.choice(list(header))]["dtype"] = dtype
    (folder / WEIGHTS).write_bytes(weights(header, data))
    return "its shape's size|must be one of|unknown type|is malformed"


def _wrong_shape(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    entry = header[random.choice(list(header))]
    rows, columns = entry["shape"]
    entry["shape"] = random.choice(
        [[columns, rows] if rows != columns else [1, rows * columns], [rows * columns],
         [1, rows, columns], [rows * 2, columns], [], [-rows, -columns], [0], [1 << 61, 1 << 61],
         [1] * 1000, {}, [str(rows), columns]]
    )  # fmt: skip
    (folder / WEIGHTS).write_bytes(weights(header, data))
    return "is corrupt|has shape"


def _not_finite(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    values = np.frombuffer(data, dtype=np.float32).copy()
    values[random.randrange(len(values))] = random.choice([math.nan, math.inf, -math.inf])
    (folder / WEIGHTS).write_bytes(weights(header, values.tobytes()))
    return "not finite numbers"


def _too_large(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    values = np.frombuffer(data, dtype=np.float32).copy()
    values[:] = 3e38
    (folder / WEIGHTS).write_bytes(weights(header, values.tobytes()))
    _edit(good, folder, lora_alpha=1e30)
    return "too large for"


def _absurd_rank(random: Random, good: Good, folder: Path) -> str:
    rank: Any = random.choice(
        [0, -1, 513, 10**9, 1 << 64, 1.5, "8", None, True, [8], {}, math.nan, math.inf, 10**400]
    )
    if random.random() < 0.5:
        _edit(good, folder, rank_pattern={"q_proj": rank})
    else:
        _edit(good, folder, r=rank)
    return "ranks must be integers between 1 and"


def _absurd_alpha(random: Random, good: Good, folder: Path) -> str:
    alpha = random.choice([math.nan, math.inf, "16", None, [1], 10**400])
    _edit(good, folder, lora_alpha=alpha)
    return "lora_alpha .* finite number"


def _other_rank(random: Random, good: Good, folder: Path) -> str:
    _edit(good, folder, r=random.choice([1, 2, 7, 500, 512]))
    return "has shape"


def _wild_pattern(random: Random, good: Good, folder: Path) -> str:
    pattern = random.choice(
        [
            "(a+)+$",
            "(x*)*y",
            "(",
            "[",
            "a" * 10_000,
            "(a|a)*b",
            "((((((((a))))))))",
            "*",
            "\\",
            ".*" * 9,
            "(?x)(?:.+) +!",
            "(?x:(?:.+) +)!",
            "(?:.+)(?#)+!",
        ]
    )
    _edit(good, folder, **{random.choice(["rank_pattern", "alpha_pattern"]): {pattern: 8}})
    return "_pattern .*(too complex|not a regular expression)"


def _wild_tokenizer(random: Random, good: Good, folder: Path) -> str:
    """One that makes texts very long, takes very long over them, or is very large in memory."""
    doubles = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30
    regex = {"type": "Split", "pattern": {"Regex": "(?x:(?:q|q) +)[!?]"}, "behavior": "Isolated"}
    file = json.loads(tokenizer_json())
    changes: dict[str, Any] = random.choice(
        [{"normalizer": {"type": "Sequence", "normalizers": doubles}},
         {"decoder": {"type": "Sequence", "decoders": doubles}},
         {"decoder": doubles[0]},
         {"pre_tokenizer": regex | {"invert": False}},
         {"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**7}},
         {"x": [[]] * 1_000_000}]
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(file | changes))
    return "tokenizer.json"


def _config_of_rubbish(random: Random, good: Good, folder: Path) -> str:
    rubbish = [
        b"", b"\x00", b"null", b"[]", b'"LORA"', b"[" * 1_000_000, b'{"a":' * 100_000,
        random.randbytes(5000), b'{"r": ' + b"9" * 100_000 + b"}", b"\xef\xbb\xbf{}", b"{'r': 8}",
        pickle.dumps({"peft_type": "LORA"}), json.dumps(good.config).encode()[:-1] + b'\xff":1}',
    ]  # fmt: skip
    (folder / CONFIG).write_bytes(random.choice(rubbish))
    return f"{CONFIG} is not|peft_type"


def _vast_config(random: Random, good: Good, folder: Path) -> str:
    with (folder / CONFIG).open("r+b") as file:
        file.truncate(100_000_000 + random.randrange(1000))
    return f"{CONFIG} .*(larger than|bytes)"


def _large_config(random: Random, good: Good, folder: Path) -> str:
    _edit(good, folder, x="x" * random.randrange(1 << 20, 4 << 20))
    return f"{CONFIG} .*(larger than|bytes)"


def _what_is_not_served(random: Random, good: Good, folder: Path) -> str:
    changes: dict[str, Any] = random.choice(
        [{"peft_type": "PREFIX_TUNING"}, {"peft_type": None}, {"peft_type": ["LORA"]},
         {"layer_replication": [[0, 2]]}, {"alora_invocation_tokens": [1]},
         {"init_lora_weights": {"a": 1}}, {"use_rslora": "yes"}]
    )  # fmt: skip
    _edit(good, folder, **changes)
    return next(iter(changes))


def _many_tensors(random: Random, good: Good, folder: Path) -> str:
    count = random.choice([10_000, 150_000])
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    (folder / WEIGHTS).write_bytes(weights(header, b""))
    return "is not one that is served|is corrupt"


def _unknown_modules(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    name = random.choice([name for name in header if "lora_A" in name])
    other = random.choice(
        [name.replace("layers.0", "layers.99").replace("layers.1", "layers.99"), "x", name + ".x",
         "../" * 9 + name, name.replace("lora_A", "lora_B"), "a" * 99_999, f"model.{name}"]
    )  # fmt: skip
    header[other] = header.pop(name)  # some of them replace another
    (folder / WEIGHTS).write_bytes(weights(header, data))
    return "is not one that is served|not among the adaptable|and no lora_|leave gaps"


def _half_a_pair(random: Random, good: Good, folder: Path) -> str:
    header, data = good.parts()
    last = max(header, key=lambda name: int(header[name]["data_offsets"][1]))
    start = header.pop(last)["data_offsets"][0]
    (folder / WEIGHTS).write_bytes(weights(header, data[:start]))
    return "and no lora_"


class _Bomb:
    """What unpickling it runs."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


def _pickle_bomb(random: Random, good: Good, folder: Path) -> str:
    bomb = pickle.dumps(_Bomb(folder.parent.parent / "exploded"))
    if random.random() < 0.5:
        (folder / WEIGHTS).write_bytes(bomb)
        return "is corrupt"
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(bomb)
    return "adapter_model"


def _no_regular_file(random: Random, good: Good, folder: Path) -> str:
    name = random.choice(FILES)
    path = folder / name
    path.unlink()
    kind = random.choice(["fifo", "directory", "socket", "device"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        _bind(path)
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:  # only root may
            os.mkfifo(path)
    return f"{name} is not a regular file"


def _bind(path: Path) -> None:
    """A socket in the file system; its own path may be too long for the system call."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def _missing(random: Random, good: Good, folder: Path) -> str:
    name = random.choice(FILES)
    (folder / name).unlink()
    return f"no {name}"


def _links_out(random: Random, good: Good, folder: Path) -> str:
    name = random.choice(FILES)
    (folder / name).unlink()
    outside = good.copy(folder.parent.parent / f"outside-{folder.name}")
    target = random.choice([str(outside / name), f"../../{outside.name}/{name}", "/dev/zero", name])
    (folder / name).symlink_to(target)
    return "There is no local adapter|cannot be read|has no"


def _link_out(random: Random, good: Good, folder: Path) -> str:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    outside = good.copy(folder.parent.parent / f"outside-{folder.name}")
    folder.symlink_to(random.choice([str(outside), f"../{outside.name}", "/", folder.name]))
    return "There is no local adapter"


def _hard_link(random: Random, good: Good, folder: Path) -> str:
    """Of a file outside that is no adapter's: none of it may be in the answer."""
    name = random.choice(FILES)
    (folder / name).unlink()
    secret = folder.parent.parent / f"secret-{folder.name}"
    secret.write_text("root:$6$verysecret:19000:0:99999:7:::\n" * 99)
    (folder / name).hardlink_to(secret)
    return "is corrupt|is not valid JSON"


FOLDERS: tuple[Damage, ...] = (
    _cut, _absurd_header_length, _header_of_rubbish, _names_that_are_no_text, _doubled_names,
    _doubled_config_keys, _wild_offsets, _same_bytes_for_all, _more_at_the_end, _lying_type,
    _wrong_shape, _not_finite, _too_large, _absurd_rank, _absurd_alpha, _other_rank, _wild_pattern,
    _config_of_rubbish, _vast_config, _what_is_not_served, _many_tensors, _unknown_modules,
    _half_a_pair, _pickle_bomb, _wild_tokenizer, _no_regular_file, _missing, _links_out,
    _link_out, _hard_link,
)  # fmt: skip
# What is in the files themselves, so that it can come over a network.
DOWNLOADS: tuple[Damage, ...] = (
    _cut, _absurd_header_length, _header_of_rubbish, _doubled_names, _wild_offsets, _lying_type,
    _not_finite, _absurd_rank, _wild_pattern, _config_of_rubbish, _large_config, _pickle_bomb,
)  # fmt: skip

_PACKS: tuple[Callable[[dict[str, bytes]], bytes], ...] = (tar_of, zip_of)
_PATHS_OUT = (
    "../{}",
    "../../../{}",
    "/{}",
    "/etc/{}",
    "a/../../{}",
    "..\\{}",
    "C:\\{}",
    "a\\..\\..\\{}",
)


def _slip(random: Random, files: dict[str, bytes]) -> bytes:
    """An archive with a good adapter and one more name, which leads out."""
    out = random.choice(_PATHS_OUT).format(f"slipped-{random.randrange(10**6)}")
    return random.choice(_PACKS)(files | {out: b"slipped"})


def _slipped_weights(random: Random, files: dict[str, bytes]) -> bytes:
    """An archive whose adapter itself is elsewhere."""
    out = random.choice(_PATHS_OUT)
    return random.choice(_PACKS)({out.format(name): content for name, content in files.items()})


def _link_and_file_behind(random: Random, files: dict[str, bytes]) -> bytes:
    """A link to a directory outside, then a file in it: as naive unpacking would follow."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        link = tarfile.TarInfo("a")
        link.type = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE])
        link.linkname = random.choice(["/tmp", "../..", "/etc/passwd"])
        tar.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(f"a/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def _noise(random: Random, files: dict[str, bytes]) -> bytes:
    """A good archive with a stretch of it overwritten."""
    packed = bytearray(random.choice(_PACKS)(files))
    start = random.randrange(4, len(packed) // 2)
    packed[start : start + 200] = random.randbytes(200)
    return bytes(packed)


_ARCHIVES: tuple[tuple[Callable[[Random, dict[str, bytes]], bytes], str], ...] = (
    (_slip, "leads out of it"),
    (_slipped_weights, "leads out of it"),
    (_link_and_file_behind, "neither a file nor a directory"),
    (_noise, "The archive"),
)

_IDS = (
    "../outside", "..", ".", "/", "/etc", "./../good/..", "good/../../good", "~", "~root",
    "no-such-adapter", "good/adapter_config.json", "a" * 400, "good\\..\\..", "%2e%2e/good",
)  # fmt: skip


def local_folders(random: Random, good: Good, root: Path, count: int) -> list[Hostile]:
    """`count` folders under `root`, every kind in turn."""
    return [
        Hostile(damage.__name__, "local", name, damage(random, good, good.copy(root / name)))
        for damage, name in _in_turn(FOLDERS, "bad", count)
    ]


def local_ids(random: Random, count: int) -> list[Hostile]:
    """Names of what is not under the root, or no adapter."""
    ids = random.sample(_IDS, count)
    said = "There is no local adapter|has no|must be its folder's path"
    return [Hostile("id", "local", name, said) for name in ids]


def repositories(random: Random, good: Good, root: Path, count: int) -> list[Hostile]:
    """`count` folders under `root`, which a hub serves as evil/NAME; and names of none."""
    made = [
        Hostile(
            damage.__name__, "hub", f"evil/{name}", damage(random, good, good.copy(root / name))
        )
        for damage, name in _in_turn(DOWNLOADS, "repo", count)
    ]
    ids = (
        "../../etc/passwd",
        "evil/../../x",
        "evil/x@../../x",
        "a/b/c",
        "evil/\\x",
        "..",
        "evil/..",
    )
    return made + [Hostile("id", "hub", name, "is not the name|has no") for name in ids]


def archives(random: Random, good: Good, root: Path, url: str, count: int) -> list[Hostile]:
    """`count` archives that break the rules, all kinds that are known, and hostile adapters."""
    root.mkdir()
    made = []
    for number, (make, words) in enumerate(REFUSED.values()):
        words += "|is empty|--adapter-archive-bytes"
        made.append((f"known-{number}", make(good.files), words))
    for number in range(count):
        pack, words = _ARCHIVES[number % len(_ARCHIVES)]
        made.append((f"fuzzed-{number}", pack(random, good.files), words))
    for damage, name in _in_turn(DOWNLOADS, "packed", len(DOWNLOADS)):
        folder = good.copy(root.parent / "unpacked" / name)
        words = damage(random, good, folder)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        made.append((name, tar_of(files), f"{words}|bytes in it|has no|\\d+ bytes"))
    for name, content, _ in made:
        (root / name).write_bytes(content)
    return [Hostile(name, "http", f"{url}/{name}", words) for name, _, words in made]


def objects(random: Random, good: Good, root: Path, put: Put, bucket: str) -> list[Hostile]:
    """Adapters in a bucket, each kind once, keys that lead out of their prefix, names of none."""
    made = []
    for damage, name in _in_turn(DOWNLOADS, "object", len(DOWNLOADS)):
        folder = good.copy(root / name)
        words = damage(random, good, folder)
        for path in folder.iterdir():
            put(f"evil/{name}/{path.name}", path.read_bytes())
        made.append(Hostile(damage.__name__, "s3", f"s3://{bucket}/evil/{name}", words))
    for number, out in enumerate(_PATHS_OUT):
        for name, content in good.files.items():
            put(f"slip-{number}/{out.format(name)}", content)
        made.append(Hostile("slip", "s3", f"s3://{bucket}/slip-{number}", "S3 has no"))
    ids = (
        f"s3://{bucket}/../../etc", f"s3://{bucket}/none", f"s3://{bucket}/evil", f"s3://{bucket}/",
        "s3://other/x", "s3://../x", "s3://A/x", f"s3://{bucket}/{'a' * 2000}", f"{bucket}\\x",
    )  # fmt: skip
    wanted = "S3 has no|is not an adapter of S3|not served here|printable characters"
    return made + [Hostile("id", "s3", id, wanted) for id in ids]


def _in_turn(damages: tuple[Damage, ...], prefix: str, count: int) -> list[tuple[Damage, str]]:
    return [(damages[i % len(damages)], f"{prefix}-{i}") for i in range(count)]


def _edit(good: Good, folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(good.config | changes))
