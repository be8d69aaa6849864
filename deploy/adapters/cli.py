"""`lorafleet adapters`: its subcommands and their flags."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import aiohttp

from lorafleet.deploy.adapters import report
from lorafleet.deploy.adapters.client import ServerRefused, call
from lorafleet.deploy.output import Output
from lorafleet.deploy.server_url import DEFAULT_URL, VARIABLE, server_url, what_failed
from lorafleet.shard.model_folder import check_path

_SOURCES = ("local", "hub", "s3", "http")


def add_flags(parser: ArgumentParser) -> None:
    """Adds the subcommands."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = commands.add_parser
    _server_flags(add("list", help="what is loaded, pinned and named, and how it is used"))
    load = add("load", help="load now, before a request does, and name")
    _server_flags(load)
    _name_flags(load)
    load.add_argument(
        "--tier",
        choices=("disk", "host", "device"),
        default="host",
        help="where to, at least (default: host)",
    )
    load.add_argument("--alias", default="", help="a name that requests may use for it")
    load.add_argument(
        "--reload",
        action="store_true",
        help="what its source has now; requests under way end with what they began with",
    )
    pin = add("pin", help="load, and keep from being evicted")
    _server_flags(pin)
    _name_flags(pin)
    where = pin.add_mutually_exclusive_group()
    where.add_argument("--device", action="store_true", help="on the device as well")
    where.add_argument("--release", action="store_true", help="end the pin")
    drop = add("drop", help="free every tier, once the requests that use it have ended")
    _server_flags(drop)
    _name_flags(drop)
    _check_flags(add("check", help="say whether folders can be served, without a server"))


def run(args: Namespace) -> int:
    """One action. 0 when it was done; 1 when it was refused; 2 for a flag or a server amiss."""
    try:
        return _ACTIONS[args.action](args)
    except ServerRefused as error:
        print(f"lorafleet adapters: {error}", file=sys.stderr)
        return 1
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        said = what_failed(error, args.url) if hasattr(args, "url") else str(error)
        print(f"lorafleet adapters: error: {said}", file=sys.stderr)
        return 2


def _list(args: Namespace) -> int:
    adapters = _ask(args, "GET", "/v1/adapters")["data"]
    if args.json:
        print(json.dumps(adapters, indent=2))
    else:
        report.print_adapters(Output(), adapters)
    return 0


def _load(args: Namespace) -> int:
    return _post(args, {"tier": args.tier, "alias": args.alias, "reload": args.reload})


def _pin(args: Namespace) -> int:
    wanted = "device" if args.device else "none" if args.release else "host"
    return _post(args, {"pin": wanted})


def _drop(args: Namespace) -> int:
    query = {"adapter_source": args.source, "revision": args.revision}
    answer = _ask(args, "DELETE", f"/v1/adapters/{args.name}", query=query)
    print(json.dumps(answer, indent=2) if args.json else f"{answer['id']} is dropped")
    return 0


def _check(args: Namespace) -> int:
    check_path(args.model_id)
    from lorafleet.deploy.adapters.check import check_folders  # brings torch

    verdicts = check_folders(
        args.paths, args.model_id, args.revision, args.num_shard, args.dtype,
        args.allow_pickled_adapters,
    )  # fmt: skip
    if args.json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts], indent=2))
    else:
        report.print_verdicts(Output(), verdicts)
    return 0 if all(verdict.is_served for verdict in verdicts) else 1


_ACTIONS: dict[str, Callable[[Namespace], int]] = {
    "list": _list,
    "load": _load,
    "pin": _pin,
    "drop": _drop,
    "check": _check,
}


def _post(args: Namespace, fields: dict[str, Any]) -> int:
    body = {"adapter_id": args.name, "adapter_source": args.source, "revision": args.revision}
    body |= {"api_token": os.environ.get("API_TOKEN", "")} | fields
    answer = _ask(args, "POST", "/v1/adapters", body=body)
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        report.print_adapters(Output(), [answer])
    return 0


def _ask(args: Namespace, method: str, path: str, **options: Any) -> dict[str, Any]:
    args.url = server_url(args.url)
    return asyncio.run(call(args.url, args.admin_api_key, method, path, **options))


def _server_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        help=f"the server's router (env {VARIABLE}; default: {DEFAULT_URL})",
    )
    parser.add_argument(
        "--admin-api-key",
        default=os.environ.get("ADMIN_API_KEY", ""),
        help="the server's admin key, if it has one (env ADMIN_API_KEY)",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def _name_flags(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="an adapter's id, or an alias")
    parser.add_argument(
        "--source",
        choices=_SOURCES,
        default="",
        help="where it comes from (default: where the server's adapters do); a private one's token "
        "is read from API_TOKEN",
    )
    parser.add_argument("--revision", default="", help="of a hub adapter")


def _check_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", help="a folder in PEFT's layout")
    add(
        "--model-id",
        required=True,
        help="the base model: a folder or a hub id, of which only config.json is read",
    )
    add("--revision", default="", help="commit, branch or tag of a hub model")
    add("--num-shard", type=int, default=1, help="shards it would be served on (default: 1)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="serving dtype; auto takes the model's (default: auto)",
    )
    add(
        "--allow-pickled-adapters",
        action="store_true",
        help="as a server with this flag, which loads adapter_model.bin and .pt",
    )
    add("--json", action="store_true", help="JSON instead of a table")
