"""TokenizerReader: looks at the tokenizers that adapters ship, in processes of its own."""

from __future__ import annotations

import asyncio
import json

from lorafleet.router import child_process
from lorafleet.router.errors import AdapterUnservable
from lorafleet.router.tokenizer_process import LENGTH_BYTES

_MODULE = "lorafleet.router.tokenizer_process"
_SECONDS = 60.0  # for one file; those of today's models take one or two


class TokenizerReader:
    """A process for each file, `num_processes` at a time."""

    def __init__(self, base: bytes, num_processes: int) -> None:
        """`base`: the base model's tokenizer.json."""
        self._base = base
        self._places = asyncio.Semaphore(num_processes)

    async def is_bases(self, data: bytes) -> bool:
        """Whether a tokenizer.json makes the base's tokens of every text.

        Raises AdapterUnservable for one that cannot be used.
        """
        if data == self._base:
            return True
        async with self._places:
            answer = await _ask(self._base, data)
        if "error" in answer:
            raise AdapterUnservable(answer["error"])
        return bool(answer["is_same"])


async def _ask(*files: bytes) -> dict[str, str]:
    process = await child_process.start(_MODULE)
    try:
        async with asyncio.timeout(_SECONDS):
            lengths = [len(file).to_bytes(LENGTH_BYTES, "little") for file in files]
            output, _ = await process.communicate(
                b"".join(part for pair in zip(lengths, files, strict=True) for part in pair)
            )
    except TimeoutError:
        raise _too_much(f"more than {_SECONDS:g} s") from None
    finally:
        await child_process.kill(process)
    if process.returncode != 0:
        raise _too_much("too much memory or time, or what no tokenizer has,")
    answer: dict[str, str] = json.loads(output)
    return answer


def _too_much(what: str) -> AdapterUnservable:
    return AdapterUnservable(f"the adapter's tokenizer.json takes {what} to be read")
