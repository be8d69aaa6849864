"""One shard process: `python -m lorafleet.shard --model-id DIR ...`.

Events for the launcher go to standard output, one JSON object a line; logs go to standard error.
The RPC threads answer from the start; the main thread loads the weights and then computes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from typing import Any

from lorafleet.proto.flags import add_flags, from_flags
from lorafleet.proto.lifeline import watch_parent
from lorafleet.proto.messages import ShardInfo
from lorafleet.shard.config import ShardConfig
from lorafleet.shard.errors import BadCheckpoint, UnsupportedModel
from lorafleet.shard.group import Group
from lorafleet.shard.load import LoadedShard, load_shard, pick_device
from lorafleet.shard.service import ShardService

log = logging.getLogger("lorafleet.shard")

_STOP_SECONDS = 1.0  # RPCs in flight get this long


def main() -> int:
    """Runs until SIGTERM, SIGINT or the launcher's end; returns the exit code."""
    parser = argparse.ArgumentParser("lorafleet.shard", description=__doc__)
    add_flags(parser, ShardConfig)
    try:
        config = from_flags(ShardConfig, parser.parse_args())
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    service = ShardService()
    _stop_on_signals(service)
    watch_parent(lambda: os._exit(0))  # nobody is left to answer to
    server = service.listen(config.listen)
    try:
        return _serve(config, service)
    except (UnsupportedModel, BadCheckpoint) as error:
        log.error("%s", error)
        return 2
    finally:
        server.stop(_STOP_SECONDS).wait()


def _stop_on_signals(service: ShardService) -> None:
    def stop(*_: object) -> None:
        service.stop()
        if not service.is_open:
            raise SystemExit(0)  # still loading: there is no step to finish

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _serve(config: ShardConfig, service: ShardService) -> int:
    started = time.perf_counter()
    device = pick_device(config.device, config.rank)
    group = Group(config.rank, config.num_shard, device, config.rendezvous)
    shard = load_shard(config, group, device, _progress(config.rank))
    service.open(shard.info, shard.store)
    seconds = round(time.perf_counter() - started, 2)
    _emit(event="ready", rank=config.rank, seconds=seconds, info=_summary(shard.info))
    _run(shard, service)
    group.close()
    return 0


def _run(shard: LoadedShard, service: ShardService) -> None:
    try:
        shard.worker.run(service.work)
    except Exception:
        # Healthy or gone: no RPC thread may keep this process, nor a rank that waits for it.
        log.exception("the compute loop failed; this shard exits")
        logging.shutdown()
        os._exit(1)


def _progress(rank: int) -> Any:
    """Reports weight loading a hundred times at most, from rank 0 only."""
    reported = -1

    def report(done: int, total: int) -> None:
        nonlocal reported
        percent = 100 * done // max(total, 1)
        if rank == 0 and percent != reported:
            reported = percent
            _emit(event="loading", done_bytes=done, total_bytes=total)

    return report


def _summary(info: ShardInfo) -> dict[str, Any]:
    """What the launcher's banner shows."""
    names = (
        "model_id", "architecture", "dtype", "device", "num_pages", "page_size", "arena_bytes",
        "host_bytes", "num_slots", "max_model_len",
    )  # fmt: skip
    return {name: getattr(info, name) for name in names}


def _emit(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main())
