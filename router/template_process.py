"""python -m lorafleet.router.template_process: renders chat templates that nobody vouches for.

Reads requests from stdin and writes answers to stdout, each a length of four bytes and JSON: the
template's configuration and the messages; the text or an error. A template is a program, so this
process has little memory and time, and whoever started it kills it when it takes too long.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any, BinaryIO

from lorafleet.router.chat import ChatTemplate, TemplateFailed

LENGTH_BYTES = 4
MAX_TEXT_BYTES = 16 << 20
_MAX_MEMORY_BYTES = 512 << 20
_MAX_SECONDS = 10  # of computing for one answer; for a process whose parent was killed


def main() -> None:
    """Says that it is there, then answers until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _write(sink, {})
    while (request := _read(source)) is not None:
        _limit_time()
        _write(sink, _answer(request))


def _answer(request: Any) -> dict[str, str]:
    try:
        text = ChatTemplate(request["config"]).render(request["messages"])
    except TemplateFailed as error:
        return {"error": str(error)[:1000]}
    except Exception as error:  # a compiler of programs from outside: anything
        return {"error": f"the chat template cannot be used: {type(error).__name__}"}
    if len(text) > MAX_TEXT_BYTES:
        return {"error": f"the chat template gives more than {MAX_TEXT_BYTES} characters"}
    return {"text": text}


def _read(source: BinaryIO) -> Any:
    head = source.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    return json.loads(source.read(int.from_bytes(head, "little")))


def _write(sink: BinaryIO, answer: dict[str, str]) -> None:
    data = json.dumps(answer).encode()
    sink.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    sink.flush()


def _limit_time() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + _MAX_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
