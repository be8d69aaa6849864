"""`lorafleet serve`: flags to configs, the checks that need no weights, then the launch."""

from __future__ import annotations

import asyncio
import socket
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from lorafleet.deploy.launch import Launch, Programs
from lorafleet.proto.flags import add_flags as add_config_flags
from lorafleet.proto.flags import from_flags
from lorafleet.router.config import RouterConfig
from lorafleet.shard.config import ShardConfig
from lorafleet.shard.model_folder import check_model

SET_BY_LAUNCHER = ("rank", "listen", "rendezvous", "shards")


def add_flags(parser: ArgumentParser) -> None:
    """Adds every dial of the shards and the router."""
    add_config_flags(parser, ShardConfig, RouterConfig, skip=SET_BY_LAUNCHER)


def run(args: Namespace, programs: Programs | None = None) -> int:
    """Serves until asked to stop. Returns the exit code: 2 when a flag cannot be honoured."""
    try:
        shard, router = configs(args)
        check_adapter_root(shard.adapter_root)
        check_model(shard.model_id, shard.num_shard)
        check_port_is_free(router.hostname, router.port)
        return asyncio.run(Launch(shard, router, programs or Programs()).run())
    except ValueError as error:
        print(f"lorafleet serve: error: {error}", file=sys.stderr)
        return 2


def configs(args: Namespace) -> tuple[ShardConfig, RouterConfig]:
    """Both configs, the default adapter source resolved. Raises ValueError naming the flag."""
    shard, router = from_flags(ShardConfig, args), from_flags(RouterConfig, args)
    source = router.adapter_source or ("local" if shard.adapter_root else "hub")
    for name in ("adapter_source", "preloaded_adapter_source"):
        if getattr(router, name) == "local" and not shard.adapter_root:
            raise ValueError(f"--{name.replace('_', '-')} local needs --adapter-root")
    return shard, replace(router, adapter_source=source)


def check_adapter_root(root: str) -> None:
    """Raises ValueError unless `root` is empty or a directory."""
    if root and not Path(root).is_dir():
        raise ValueError(f"--adapter-root {root} is not a directory")


def check_port_is_free(hostname: str, port: int) -> None:
    """Raises ValueError when the router could not listen there, before any weight is read."""
    try:
        places = socket.getaddrinfo(
            hostname or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise ValueError(f"--hostname {hostname}: {error.strerror}") from error
    for family, kind, protocol, _, address in places:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise ValueError(f"--port {port} on {hostname}: {error.strerror}") from error
