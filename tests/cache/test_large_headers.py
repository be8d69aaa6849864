"""Large safetensors headers, read by many threads at once, take the memory of one."""

from __future__ import annotations

import json
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.safetensors_file import read_header

NUM_TENSORS, NUM_READERS = 10_000, 6


def test_many_at_once_take_the_memory_of_one(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}  # of an empty file
    header = json.dumps({f"t{number:060}": entry for number in range(NUM_TENSORS)}).encode()
    assert len(header) > 1 << 20
    path.write_bytes(struct.pack("<Q", len(header)) + header)

    def said(_: int) -> str:
        try:
            read_header(path)
        except AdapterUnservable as error:
            return str(error)
        return "nothing"

    def peak(num_readers: int) -> int:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        with ThreadPoolExecutor(num_readers) as pool:
            assert all("leave gaps" in text for text in pool.map(said, range(num_readers)))
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        one = peak(1)
        assert peak(NUM_READERS) < 2.5 * one
    finally:
        tracemalloc.stop()
