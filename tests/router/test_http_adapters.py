"""/v1/adapters, aliases, pins, vLLM's routes, and who may call them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.admin import refusal_of
from lorafleet.router.config import RouterConfig
from lorafleet.router.preload import configured_names, preload
from tests.fake_model import FakeModel
from tests.fakes import SECRET, FakeConfig
from tests.router.http_service import delete, listed, parse_frames, sent, serving, until

BYTES = 4096  # of adapter-0, -3, -6, ...; adapter-1, -4, ... take twice, adapter-2, -5, ... thrice
ADMIN = "key-of-the-admin"


async def test_load_shows_everything_known_of_an_adapter() -> None:
    async with serving() as service:
        answer = await service.json("/v1/adapters", {"adapter_id": "adapter-1", "tier": "device"})
        assert (await listed(service))["adapter-1"] == answer
        assert (answer["tier"], answer["rank"], answer["target_modules"]) == (
            "device",
            8,
            ["q_proj"],
        )
        assert (answer["bytes"], answer["digest"]) == (2 * BYTES, "digest of adapter-1")
        assert answer["groups"] == [{"group": 0, "tier": "device", "slot": 1}]
        assert list(answer["load_seconds"]) == ["disk", "host", "device"]
        assert (answer["requests"], answer["last_used_at"], answer["pinned"]) == (0, None, None)
        await service.generate("abc", adapter_id="adapter-1", max_new_tokens=5)
        used = (await listed(service))["adapter-1"]
    assert (used["requests"], used["prompt_tokens"], used["generated_tokens"]) == (1, 3, 5)
    assert used["last_used_at"] > 1e9
    assert used["in_use"] == 0


async def test_an_alias_is_pointed_elsewhere_while_a_request_goes_on() -> None:
    config = FakeConfig(step_seconds=0.002)
    expected = FakeModel()
    async with serving(config) as service:

        async def point(name: str) -> None:
            await service.json("/v1/adapters", {"adapter_id": name, "alias": "prod"})

        await point("adapter-1")
        body = {"inputs": "`", "parameters": {"adapter_id": "prod", "max_new_tokens": 200}}
        old = await service.post("/generate_stream", body)
        assert old.headers["x-adapter-id"] == "adapter-1"
        first = await old.content.readline()
        await point("adapter-2")
        new = await service.generate("`", adapter_id="prod", max_new_tokens=20, details=True)
        frames = parse_frames((first + await old.content.read()).decode())
        ids = [frame["token"]["id"] for frame in frames]
        models = await (await service.client.get("/v1/models")).json()
        assert {"id": "prod", "root": "adapter-2"}.items() <= models["data"][-1].items()
        assert (await listed(service))["adapter-2"]["aliases"] == ["prod"]
        starts = [start for plan in service.shard.plans for start in plan.starts]
        prompt = starts[0].token_ids
        assert ids == expected.expected_tokens(prompt, 200, AdapterKey("local", "adapter-1"))
        assert [token["id"] for token in new["details"]["tokens"]] == expected.expected_tokens(
            prompt, 20, AdapterKey("local", "adapter-2")
        )
        chat = await service.json(
            "/v1/completions", {"model": "prod", "prompt": "a", "max_tokens": 1}
        )
        assert chat["model"] == "prod"
        assert await delete(service, "/v1/aliases/prod") == (
            200, {"id": "prod", "object": "alias", "deleted": True},
        )  # fmt: skip
        assert "adapter-2" in await listed(service)
        gone = {"inputs": "a", "parameters": {"adapter_id": "prod"}}
        await service.json("/generate", gone, status=404)
        assert (await delete(service, "/v1/aliases/prod"))[0] == 404


@pytest.mark.parametrize("name", ["fake", "__base_model__", "a\n", "x" * 513])
async def test_names_that_cannot_be_aliases_are_refused(name: str) -> None:
    async with serving() as service:
        body = {"adapter_id": "adapter-1", "alias": name}
        answer = await service.json("/v1/adapters", body, status=422)
        assert answer["error"]["param"] == "alias"
        assert service.shard.fetches == []


async def test_an_alias_hides_no_adapter_that_is_known() -> None:
    async with serving() as service:
        await service.generate("a", adapter_id="adapter-2", max_new_tokens=1)
        taken = {"adapter_id": "adapter-1", "alias": "adapter-2"}
        answer = await service.json("/v1/adapters", taken, status=422)
        assert answer["error"]["param"] == "alias"
        assert "is the name of an adapter" in answer["error"]["message"]
        taken = {"lora_name": "adapter-2", "lora_path": "adapter-1"}
        answer = await service.json("/v1/load_lora_adapter", taken, status=422)
        assert answer["error"]["param"] == "lora_name"
        config = RouterConfig(adapter_source="local", adapter_aliases=("adapter-2=adapter-1",))
        with pytest.raises(ValueError, match=r"--adapter-aliases adapter-2: .* name of an adapter"):
            await preload(service.engine, config)
        own = {"lora_name": "adapter-2", "lora_path": "adapter-2"}  # as vLLM's users do
        assert (await service.post("/v1/load_lora_adapter", own)).status == 200


async def test_an_alias_that_came_first_may_be_pointed_on() -> None:
    async with serving() as service:
        await service.json("/v1/adapters", {"adapter_id": "adapter-1", "alias": "adapter-2"})
        full = {"adapter_id": "adapter-2", "adapter_source": "local"}
        await service.json("/v1/adapters", full)
        await service.json("/v1/adapters", {"adapter_id": "adapter-3", "alias": "adapter-2"})
        assert (await listed(service))["adapter-3"]["aliases"] == ["adapter-2"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "adapter_id"),
        ({"adapter_id": "fake-not", "tier": "moon"}, "tier"),
        ({"adapter_id": "a", "pin": True}, "pin"),
        ({"adapter_id": "__base_model__"}, "adapter_id"),
        ({"adapter_id": "a", "revision": "\n"}, "revision"),
        ({"adapter_id": "a", "adapter_source": "s4"}, "adapter_source"),
    ],
)
async def test_a_bad_field_is_named(body: dict[str, Any], param: str) -> None:
    async with serving() as service:
        answer = await service.json("/v1/adapters", body, status=422)
        assert answer["error"]["param"] == param or f"`{param}`" in answer["error"]["message"]


async def test_a_pin_stays_while_others_come_and_go() -> None:
    config = FakeConfig(echo=True, host_bytes=3 * BYTES, num_slots=2, arena_bytes=2 * BYTES)
    async with serving(config) as service:
        pinned = await service.json("/v1/adapters", {"adapter_id": "adapter-0", "pin": "device"})
        assert (pinned["pinned"], pinned["tier"]) == ("device", "device")
        for name in ("adapter-3", "adapter-6", "adapter-9", "adapter-3"):
            await service.generate("a", adapter_id=name, max_new_tokens=2)
        held = await listed(service)
        assert (held["adapter-0"]["tier"], held["adapter-0"]["pinned"]) == ("device", "device")
        assert service.engine.stats().tiers[Tier.HOST].num_evictions > 0
        await service.json("/v1/adapters", {"adapter_id": "adapter-0", "pin": "none"})
        for name in ("adapter-6", "adapter-9", "adapter-12"):
            await service.generate("a", adapter_id=name, max_new_tokens=2)
        assert (await listed(service))["adapter-0"]["tier"] in ("disk", "none")


async def test_a_pin_that_cannot_fit_is_refused_before_anything_is_evicted() -> None:
    async with serving(FakeConfig(echo=True, host_bytes=4 * BYTES)) as service:
        await service.json("/v1/adapters", {"adapter_id": "adapter-1", "pin": "host"})
        for name in ("adapter-0", "adapter-3"):
            await service.generate("a", adapter_id=name, max_new_tokens=1)
        answer = await service.json(
            "/v1/adapters", {"adapter_id": "adapter-2", "pin": "host"}, status=507
        )
        assert "takes 12288 bytes of host memory on a shard; pins leave 8192" in str(answer)
        held = await listed(service)
        assert [held[f"adapter-{n}"]["tier"] for n in (1, 0, 3)] == ["host", "device", "device"]
        assert service.engine.stats().tiers[Tier.HOST].num_evictions == 0
        # A request that pins leave no room for is told so, rather than waiting for ever.
        body = {"inputs": "a", "parameters": {"adapter_id": "adapter-2"}}
        refused = await service.json("/generate", body, status=507)
        assert refused["error_type"] == "adapter_no_room"


async def test_a_device_pin_leaves_room_for_requests_under_way() -> None:
    config = FakeConfig(echo=True, num_slots=4, arena_bytes=3 * BYTES)
    async with serving(config) as service:
        service.shard.steps.close()
        body = {"inputs": "ab", "parameters": {"adapter_id": "adapter-2", "max_new_tokens": 4}}
        waiting = asyncio.create_task(service.post("/generate", body))
        await until(lambda: service.engine.stats().waiting == 1)
        pin = {"adapter_id": "adapter-0", "pin": "device"}
        answer = await service.json("/v1/adapters", pin, status=507)
        assert "of which requests under way need 12288" in answer["error"]["message"]
        service.shard.steps.open()
        assert (await waiting).status == 200
        await service.json("/v1/adapters", pin)
        refused = await service.json("/generate", body, status=507)
        assert "that pinned adapters leave it" in refused["error"]


async def test_drop_waits_for_requests_and_the_next_one_loads_anew() -> None:
    async with serving(FakeConfig(echo=True, step_seconds=0.002)) as service:
        await service.json("/v1/adapters", {"adapter_id": "adapter-1", "alias": "prod"})
        body = {"inputs": "ab", "parameters": {"adapter_id": "prod", "max_new_tokens": 200}}
        running = asyncio.create_task(service.post("/generate", body))
        await until(lambda: service.engine.stats().running == 1)
        dropping = asyncio.create_task(delete(service, "/v1/adapters/prod"))
        next_one = asyncio.create_task(
            service.generate("c", adapter_id="adapter-1", max_new_tokens=2)
        )
        await asyncio.sleep(0.05)
        assert not dropping.done()
        assert not next_one.done()
        await service.json("/generate", body, status=404)  # the name went first
        status, answer = await dropping
        assert running.done() or (await running).status == 200
        assert (status, answer["deleted"], answer["aliases"]) == (200, True, ["prod"])
        assert [drop.tier for drop in service.shard.drops] == [Tier.DISK]
        await next_one
        assert [f.tier for f in service.shard.fetches].count(Tier.HOST) == 2
        assert (await delete(service, "/v1/adapters/nobody"))[0] == 404


async def test_a_reload_keeps_the_pin_of_the_device() -> None:
    async with serving() as service:
        call = {"adapter_id": "adapter-1", "pin": "device"}
        pinned = await service.json("/v1/adapters", call)
        service.shard.contents["adapter-1"] = "new digest"
        reload = {"adapter_id": "adapter-1", "reload": True}
        reloaded = await service.json("/v1/adapters", reload)
        assert (pinned["digest"], reloaded["digest"]) == ("digest of adapter-1", "new digest")
        assert pinned["pinned"] == reloaded["pinned"] == reloaded["tier"] == "device"
        await service.json("/v1/adapters", {"adapter_id": "adapter-1", "reload": 1}, status=422)
        await service.generate("abc", adapter_id="adapter-1", max_new_tokens=1)
        assert service.shard.superseded == {}


async def test_vllms_routes() -> None:
    async with serving() as service:
        load = {"lora_name": "sql", "lora_path": "adapter-1"}
        response = await service.post("/v1/load_lora_adapter", load)
        assert await response.text() == "Success: LoRA adapter 'sql' added successfully."
        again = await service.json("/v1/load_lora_adapter", load, status=400)
        assert "has already been loaded" in again["error"]["message"]
        service.shard.contents["adapter-1"] = "new digest"
        service.shard.steps.close()  # so that a request goes on and on
        running = asyncio.create_task(service.generate("abc", adapter_id="sql"))
        await service.shard.saw(lambda: bool(service.shard.plans))
        inplace = await service.post("/v1/load_lora_adapter", load | {"load_inplace": True})
        assert inplace.status == 200
        assert not running.done()
        assert (await listed(service))["adapter-1"]["digest"] == "new digest"
        service.shard.steps.open()
        await running
        missing = {"lora_name": "x", "lora_path": "missing"}
        await service.json("/v1/load_lora_adapter", missing, status=404)
        await service.json("/v1/load_lora_adapter", {"lora_name": "x"}, status=422)
        unloaded = await service.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
        assert await unloaded.text() == "Success: LoRA adapter 'sql' removed successfully."
        assert service.shard.adapters == {}
        await service.json("/v1/unload_lora_adapter", {"lora_name": "sql"}, status=404)


ROOT = FakeConfig().adapter_root
SPELLINGS = (
    "adapter-1/", "./adapter-1", "././/adapter-1/.", f"{ROOT}/adapter-1", f"{ROOT}//./adapter-1/",
)  # fmt: skip


async def test_a_folder_is_one_adapter_however_it_is_spelled() -> None:
    async with serving() as service:
        pinned = await service.json("/v1/adapters", {"adapter_id": "adapter-1", "pin": "device"})
        for spelling in SPELLINGS:
            body = {"inputs": "a", "parameters": {"adapter_id": spelling, "max_new_tokens": 1}}
            response = await service.post("/generate", body)
            assert response.headers["x-adapter-id"] == "adapter-1"
            await service.json("/v1/completions", {"model": spelling, "prompt": "a"})
            again = await service.json("/v1/adapters", {"adapter_id": spelling, "pin": "host"})
            assert (again["id"], again["pinned"]) == ("adapter-1", "host")
        held = await listed(service)
        assert list(held) == ["adapter-1"]
        assert held["adapter-1"]["requests"] == 2 * len(SPELLINGS)
        assert held["adapter-1"]["digest"] == pinned["digest"]
        assert {fetch.key.id for fetch in service.shard.fetches} == {"adapter-1"}
        for spelling in (*SPELLINGS[:2], SPELLINGS[3], SPELLINGS[3].replace("/", "%2F")):
            assert (await delete(service, f"/v1/adapters/{spelling}"))[0] == 200
            assert await listed(service) == {}
            await service.json("/v1/adapters", {"adapter_id": "adapter-1"})


async def test_vllms_absolute_path_is_the_adapter_of_the_relative_id() -> None:
    async with serving(adapter_source="hub") as service:
        for name, path in (("one", f"{ROOT}/adapter-1/"), ("two", "./adapter-1")):
            load = {"lora_name": name, "lora_path": path}
            assert (await service.post("/v1/load_lora_adapter", load)).status == 200
        held = await listed(service)
        assert list(held) == ["adapter-1"]
        assert (held["adapter-1"]["source"], held["adapter-1"]["aliases"]) == (
            "local",
            ["one", "two"],
        )
        for path in ("/elsewhere/adapter-1", f"{ROOT}/../adapters/adapter-1", "../adapter-1", ROOT):
            load = {"lora_name": "x", "lora_path": path}
            answer = await service.json("/v1/load_lora_adapter", load, status=422)
            assert answer["error"]["param"] == "lora_path"
            assert answer["error"]["message"] == (
                "`lora_path`: the id of a local adapter must be its folder's path relative to "
                '--adapter-root, without ".."; an absolute path must begin with the root\'s'
            )


async def test_the_operators_flags_spell_ids_as_requests_do() -> None:
    spelled = (f"{ROOT}/adapter-0", "./adapter-0", "adapter-1/")
    async with serving(adapter_aliases=(f"prod={ROOT}/adapter-1",)) as service:
        config = RouterConfig(adapter_source="local", preloaded_adapter_ids=spelled)
        await preload(service.engine, config)
        held = await listed(service)
        assert list(held) == ["adapter-0", "adapter-1"]
        assert held["adapter-1"]["aliases"] == ["prod"]
        bad = RouterConfig(adapter_source="local", preloaded_adapter_ids=("a/../adapter-0",))
        with pytest.raises(ValueError, match=r"--preloaded-adapter-ids a/\.\./adapter-0: the id"):
            await preload(service.engine, bad)


async def test_ids_of_other_sources_are_left_as_they_are() -> None:
    async with serving() as service:
        for source, name in (
            ("s3", "s3://b/a/../c/"),
            ("http", "https://h/a//b/."),
            ("hub", "./a"),
        ):
            body = {"adapter_id": name, "adapter_source": source}
            await service.json("/v1/adapters", body, status=404)
            assert service.shard.fetches[-1].key == AdapterKey(source, name)


async def test_without_a_root_the_shards_say_so() -> None:
    async with serving(FakeConfig(adapter_root="")) as service:
        await service.json("/v1/adapters", {"adapter_id": f"{ROOT}/adapter-1"}, status=404)


async def test_the_admin_key_guards_every_admin_route() -> None:
    async with serving(admin_api_key=ADMIN) as service:
        paths = [
            ("GET", "/v1/adapters"), ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/a"),
            ("DELETE", "/v1/aliases/a"), ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
        ]  # fmt: skip
        for method, path in paths:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ADMIN}):
                response = await service.client.request(method, path, headers=headers)
                assert response.status == 401, (method, path)
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert ADMIN not in await response.text()
        headers = {"Authorization": f"Bearer {ADMIN}"}
        assert (await service.client.get("/v1/adapters", headers=headers)).status == 200


@pytest.mark.parametrize(
    ("remote", "headers", "is_let_in"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        ("10.0.0.1", {}, False),
        (None, {}, False),
        ("127.0.0.1", {"X-Forwarded-For": "10.0.0.1"}, False),
        ("127.0.0.1", {"Origin": "https://evil.example"}, False),
        ("127.0.0.1", {"Sec-Fetch-Site": "same-origin"}, False),
        ("127.0.0.1", {"Host": "localhost"}, True),
        ("::1", {"Host": "[::1]:3000"}, True),
        ("127.0.0.1", {"Host": "evil.example:3000"}, False),  # whose address is this machine's now
        ("127.0.0.1", {"Host": "[::1"}, False),
        ("127.0.0.1", {"Host": ""}, False),
    ],
)
def test_without_a_key_only_this_machine_manages(
    remote: str | None, headers: dict[str, str], is_let_in: bool
) -> None:
    headers = {"Host": "127.0.0.1:3000"} | headers
    assert (refusal_of("", remote, headers) is None) == is_let_in
    assert refusal_of("key", remote, headers) is not None


async def test_a_proxy_that_adds_no_header_speaks_an_old_http() -> None:
    async with serving() as service:
        answers = [
            await sent(service, f"GET /v1/adapters HTTP/{version}\r\nHost: localhost\r\n\r\n")
            for version in ("1.0", "1.1")
        ]
    assert [answer.split()[1] for answer in answers] == ["403", "200"]


async def test_no_token_is_told_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    private = {"adapter_id": "private-1", "adapter_source": "hub", "api_token": SECRET}
    headers: dict[str, Any] = {"Authorization": f"Bearer {ADMIN}"}
    async with serving(admin_api_key=ADMIN) as service:
        loaded = await service.json("/v1/adapters", private | {"alias": "own"}, **headers)
        body = {"inputs": "a", "parameters": {"adapter_id": "own", "api_token": SECRET}}
        texts = [str(loaded), str(await service.json("/generate", body))]
        no_token = {"inputs": "a", "parameters": {"adapter_id": "own"}}
        texts.append(str(await service.json("/generate", no_token, status=403)))
        wrong = private | {"api_token": "hf_other", "tier": "moon"}
        texts.append(str(await service.json("/v1/adapters", wrong, status=422, **headers)))
        pages = ("/v1/models", "/v1/adapters", "/metrics", "/info")
        got = [await service.client.get(path, headers=headers) for path in pages]
        texts += [await page.text() for page in got]
    texts += [caplog.text, repr(RouterConfig(admin_api_key=ADMIN))]
    assert "private-1" not in texts[4], "the alias tells no stranger what it stands for"
    assert "private-1" in texts[5]
    for text in texts:
        assert not any(token in text for token in (SECRET, "hf_other", ADMIN)), text


async def test_preloaded_adapters_are_pinned_and_one_that_cannot_be_is_named() -> None:
    async with serving() as service:
        config = RouterConfig(
            adapter_source="local", preloaded_adapter_ids=("adapter-0", "adapter-1")
        )
        await preload(service.engine, config)
        held = await listed(service)
        assert [held[name]["pinned"] for name in config.preloaded_adapter_ids] == ["host", "host"]
        assert held["adapter-1"]["tier"] == "device"
        bad = RouterConfig(adapter_source="local", preloaded_adapter_ids=("missing",))
        with pytest.raises(ValueError, match=r"--preloaded-adapter-ids missing: .* no adapter"):
            await preload(service.engine, bad)


async def test_aliases_of_the_flag_are_there_from_the_start_and_bad_ones_are_named() -> None:
    async with serving(adapter_aliases=("prod=adapter-1", "next=adapter=2")) as service:
        prod = await service.generate("abc", adapter_id="prod", max_new_tokens=5)
        assert prod == await service.generate("abc", adapter_id="adapter-1", max_new_tokens=5)
        held = await listed(service)
        assert held["adapter-1"]["aliases"] == ["prod"]
        assert held["adapter=2"]["aliases"] == ["next"]
        info = service.engine.info
    for text, reason in (
        ("prod", "NAME=ADAPTER_ID"),
        ("prod=", "NAME=ADAPTER_ID"),
        ("=adapter-1", "printable"),
        (f"{info.model_id}=adapter-1", "base model"),
        ("prod=../adapter-1", "relative to --adapter-root"),
    ):
        with pytest.raises(ValueError, match=f"--adapter-aliases {text}.*{reason}"):
            configured_names(RouterConfig(adapter_source="local", adapter_aliases=(text,)), info)
