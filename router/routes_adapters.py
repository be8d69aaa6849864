"""/v1/adapters and /v1/aliases: what is loaded, and what operators want loaded."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.adapter import AdapterStatus
from lorafleet.router.adapter_calls import read_key, read_load_call
from lorafleet.router.adapter_json import to_object
from lorafleet.router.admin import admin_only
from lorafleet.router.body import read_fields
from lorafleet.router.errors import AdapterNotFound
from lorafleet.router.fields import Fields
from lorafleet.router.service import SERVICE, Service


@admin_only
async def list_adapters(request: web.Request) -> web.Response:
    """GET /v1/adapters: every adapter that is loaded, on this machine, pinned or has an alias."""
    service = request.app[SERVICE]
    statuses = await service.engine.all_adapters()
    known = {status.key for status in statuses}
    named = dict.fromkeys(key for _, key in service.aliases if key not in known)
    data = [_show(service, status.key, status) for status in statuses]
    data += [_show(service, key, None) for key in named]
    return web.json_response({"object": "list", "data": data})


@admin_only
async def load_adapter(request: web.Request) -> web.Response:
    """POST /v1/adapters: reads anew, pins, loads and names an adapter, until something fails."""
    service = request.app[SERVICE]
    fields = await read_fields(request)
    call = read_load_call(fields, service.names, service.engine.info.model_id)
    if call.alias:
        await service.check_hides_nothing("alias", call.alias, call.key)
    control = service.engine.control
    if call.reload:
        await control.reload(call.key, call.api_token)
    if call.pin:
        await control.pin(call.key, call.api_token, call.pin)
    if not call.pin or call.tier > call.pin:
        await control.load(call.key, call.api_token, call.tier)
    if call.pin is Tier.NONE:
        control.unpin(call.key)
    if call.alias:
        service.aliases.point(call.alias, call.key)
    return web.json_response(_show(service, call.key, service.engine.adapter(call.key)))


@admin_only
async def drop_adapter(request: web.Request) -> web.Response:
    """DELETE /v1/adapters/{id}: takes its aliases, waits for its requests, frees every tier.

    `adapter_source` and `revision` are query parameters; an alias may stand for all three.
    """
    service = request.app[SERVICE]
    fields = Fields(dict(request.query) | {"adapter_id": request.match_info["id"]})
    key = read_key(fields, "adapter_id", service.names)
    aliases = service.aliases.names_of(key)
    if not aliases and not await service.engine.holds(key):
        raise AdapterNotFound(f"there is no adapter {key} here")
    for alias in aliases:
        service.aliases.remove(alias)
    await service.engine.control.drop(key)
    return web.json_response(
        {"id": key.id, "object": "adapter", "deleted": True, "aliases": aliases}
    )


@admin_only
async def drop_alias(request: web.Request) -> web.Response:
    """DELETE /v1/aliases/{alias}: the name goes, the adapter stays."""
    alias = request.match_info["alias"]
    if request.app[SERVICE].aliases.remove(alias) is None:
        raise AdapterNotFound(f"there is no alias {alias}")
    return web.json_response({"id": alias, "object": "alias", "deleted": True})


def _show(service: Service, key: AdapterKey, status: AdapterStatus | None) -> dict[str, Any]:
    usage = service.engine.activity.usage.of(key)
    return to_object(key, status, usage, service.aliases.names_of(key))
