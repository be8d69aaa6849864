"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them.

`lora_name` becomes an alias of the adapter at `lora_path`: a folder under the adapter root, by its
absolute path or from the root on, or a hub id. `adapter_source`, `revision` and `api_token` may be
given as for /v1/adapters.
"""

from __future__ import annotations

from aiohttp import web

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.adapter_calls import check_alias, read_key
from lorafleet.router.admin import admin_only
from lorafleet.router.body import read_fields
from lorafleet.router.errors import AdapterNotFound, BadRequest
from lorafleet.router.fields import Fields
from lorafleet.router.service import SERVICE, Service


@admin_only
async def load_lora_adapter(request: web.Request) -> web.Response:
    """Loads, then names. A name that is taken is refused unless `load_inplace` is true."""
    service = request.app[SERVICE]
    fields = await read_fields(request)
    name, key = _name(fields, service), _read_path(fields, service)
    taken = service.aliases.find(name)
    if taken is not None and not fields.boolean("load_inplace"):
        raise BadRequest(
            f"The lora adapter '{name}' has already been loaded. "
            "If you want to load the adapter in place, set 'load_inplace' to True."
        )
    await service.check_hides_nothing("lora_name", name, key)
    control, api_token = service.engine.control, fields.string("api_token", "")
    if taken == key:  # the same place, so what is there now is read again
        await control.reload(key, api_token)
    await control.load(key, api_token, Tier.HOST)
    service.aliases.point(name, key)
    return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")


@admin_only
async def unload_lora_adapter(request: web.Request) -> web.Response:
    """Takes the name back; the adapter goes, after its requests, unless it has other names."""
    service = request.app[SERVICE]
    name = _name(await read_fields(request), service)
    key = service.aliases.remove(name)
    if key is None:
        raise AdapterNotFound(f"The lora adapter '{name}' cannot be found.")
    if not service.aliases.names_of(key):
        await service.engine.control.drop(key)
    return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")


def _name(fields: Fields, service: Service) -> str:
    fields.required("lora_name")
    name = fields.string("lora_name", "")
    return check_alias("lora_name", name, service.engine.info.model_id)


def _read_path(fields: Fields, service: Service) -> AdapterKey:
    path = fields.string("lora_path", "")
    if path.startswith(("/", "./", "../")) and not fields.has("adapter_source"):
        fields = fields.with_value("adapter_source", "local")
    return read_key(fields, "lora_path", service.names.without_aliases())
