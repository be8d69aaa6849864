"""python -m lorafleet.router.tokenizer_process: reads a tokenizer.json that nobody vouches for.

Reads two files from stdin, each after its length of eight bytes: the base model's and an adapter's.
Writes JSON to stdout: whether they are the same, or an error. Parsing takes half a second or more
with the interpreter's lock held, which in the router's own process every stream would wait for.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from lorafleet.cache.tokenizer_files import is_same_tokenizer
from lorafleet.router.errors import AdapterUnservable
from lorafleet.router.tokenizer_check import check_tokenizer, read_tokenizer_file

LENGTH_BYTES = 8
_MAX_MEMORY_BYTES = 4 << 30  # three million values in 59 MB take 1 GB
_MAX_SECONDS = 60  # of computing; for a process whose parent was killed


def main() -> None:
    """Answers once."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_SECONDS, _MAX_SECONDS))
    base, data = _read(), _read()
    print(json.dumps(_answer(data, base)))


def _answer(data: bytes, base: bytes) -> dict[str, Any]:
    try:
        file, known = read_tokenizer_file(data), json.loads(base)
        if is_same_tokenizer(file, known):
            return {"is_same": True}
        check_tokenizer(file, known)
    except AdapterUnservable as error:
        return {"error": str(error)}
    return {"is_same": False}


def _read() -> bytes:
    source = sys.stdin.buffer
    return source.read(int.from_bytes(source.read(LENGTH_BYTES), "little"))


if __name__ == "__main__":
    main()
