"""`merged_adapters` over HTTP, and merges in the directory: who may use them, when they are new."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import pytest

from lorafleet.cache.merging.recipe import Member, MergeRecipe
from lorafleet.proto.messages import AdapterKey
from lorafleet.router.adapter import AdapterPin
from lorafleet.router.adapters import AdapterDirectory
from lorafleet.router.errors import AdapterForbidden, AdapterNotFound
from tests.fake_model import FakeModel
from tests.fakes import SECRET, FakeConfig, FakeShard
from tests.router.http_service import Running, serving, until
from tests.router.test_adapters import directory_of, hub

MERGE = {"ids": ["adapter-1", "adapter-2"], "weights": [0.5, 1]}
KEY = AdapterKey("merged", "linear(0.5*local:adapter-1,1.0*local:adapter-2)")


def merge_of(*members: AdapterKey) -> AdapterKey:
    return MergeRecipe(tuple(Member(member, 0.5) for member in members)).key


async def fetched(service: Running, **parameters: Any) -> list[str]:
    """The ids, each once, that a request has the shard fetch."""
    service.shard.fetches.clear()
    await service.generate("abc", max_new_tokens=1, **parameters)
    return list(dict.fromkeys(fetch.key.id for fetch in service.shard.fetches))


async def test_a_merge_is_fetched_after_its_members_and_answers_as_itself() -> None:
    async with serving(FakeConfig()) as service:
        ids = await fetched(service, merged_adapters=MERGE)
        assert (sorted(ids[:2]), ids[2:]) == (MERGE["ids"], [KEY.id])
        assert await fetched(service, merged_adapters=MERGE) == []
        expected = FakeModel().expected_tokens([3 + ord(letter) - 32 for letter in "abc"], 4, KEY)
        by_field = {"merged_adapters": MERGE}
        by_id = {"adapter_id": KEY.id, "adapter_source": "merged"}
        for chosen in (by_field, by_id):
            parameters = {"max_new_tokens": 4, "details": True} | chosen
            for path in ("/generate", "/generate_stream", "/"):
                response = await service.post(path, {"inputs": "abc", "parameters": parameters})
                assert response.status == 200, await response.text()
                assert response.headers["x-adapter-id"] == KEY.id
                assert response.headers["x-adapter-source"] == "merged"
            answer = await service.generate("abc", **parameters)
            assert [token["id"] for token in answer["details"]["tokens"]] == expected


async def test_openais_routes_take_it_beside_the_base_models_name() -> None:
    async with serving() as service:
        body = {"model": "fake", "max_tokens": 2, "merged_adapters": MERGE}
        messages = [{"role": "user", "content": "abc"}]
        for path, prompt in (("", {"prompt": "abc"}), ("chat/", {"messages": messages})):
            response = await service.post(f"/v1/{path}completions", body | prompt)
            assert (await response.json())["model"] == "fake"
            assert response.headers["x-adapter-id"] == KEY.id
            other = body | prompt | {"model": "adapter-1"}
            answer = await service.json(f"/v1/{path}completions", other, status=422)
            assert answer["error"]["message"] == (
                "at most one of `model` and `merged_adapters` may name an adapter"
            )


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({}, "linear"),
        ({"density": 0.0}, "linear"),
        ({"merge_strategy": "LINEAR", "majority_sign_method": "frequency"}, "linear"),
        ({"merge_strategy": "ties", "density": 0.5}, "ties[0.5,total]"),
        ({"merge_strategy": "dare_linear", "density": 1}, "dare_linear[1.0]"),
        (
            {"merge_strategy": "Dare_Ties", "density": 0.2, "majority_sign_method": "Frequency"},
            "dare_ties[0.2,frequency]",
        ),
    ],
)
async def test_equal_recipes_have_one_id(options: dict[str, Any], recipe: str) -> None:
    async with serving() as service:
        ids = await fetched(service, merged_adapters=MERGE | options)
        assert ids[-1] == KEY.id.replace("linear", recipe)


async def test_members_and_recipes_have_one_spelling() -> None:
    async with serving() as service:
        ids = ["./adapter-1/", "/srv/adapters/adapter-2"]
        assert (await fetched(service, merged_adapters=MERGE | {"ids": ids}))[-1] == KEY.id
        text = f"linear(0.5*local:{ids[0]},1.0*local:{ids[1]})"
        by_id = {"adapter_id": text, "adapter_source": "merged"}
        assert await fetched(service, **by_id) == []
        listed = await (await service.client.get("/v1/adapters")).json()
        held = {adapter["id"] for adapter in listed["data"]}
        assert held == {"adapter-1", "adapter-2", KEY.id}
        said = ": the id of a local adapter must be its folder's path relative to --adapter-root"
        for name, chosen in (
            ("merged_adapters.ids", {"merged_adapters": MERGE | {"ids": ["adapter-1", "a/.."]}}),
            ("adapter_id", by_id | {"adapter_id": text.replace("/srv", "/elsewhere")}),
        ):
            body = {"inputs": "a", "parameters": chosen}
            answer = await service.json("/generate", body, status=422)
            assert answer["error"].startswith(f"`{name}`{said}")


async def test_a_revision_and_an_alias_name_members() -> None:
    async with serving() as service:
        await service.json("/v1/adapters", {"adapter_id": "adapter-1", "alias": "one"})
        ids = await fetched(service, merged_adapters={"ids": ["one", "one"], "weights": [1, 2]})
        assert ids == ["linear(1.0*local:adapter-1,2.0*local:adapter-1)"]
        merge = {"ids": ["adapter-1@v1", "adapter-2"], "weights": [1, 2]}
        ids = await fetched(service, merged_adapters=merge, adapter_source="hub")
        assert ids[-1] == "linear(1.0*hub:adapter-1@v1,2.0*hub:adapter-2)"


BAD: list[tuple[Any, str, str]] = [
    (3, "`merged_adapters` must be an object, got 3", "merged_adapters"),
    ({}, "`merged_adapters.ids` is required", "merged_adapters.ids"),
    ({"ids": 3}, "`merged_adapters.ids` must be a string or a list", "merged_adapters.ids"),
    ({"ids": ["a"]}, "`merged_adapters.ids` must have between 2 and 16 adapters, got 1", ""),
    ({"ids": ["a"] * 17}, "`merged_adapters.ids` must be a string or a list of at most 16", ""),
    ({"ids": ["a", "__base_model__"]}, "`merged_adapters.ids` must name adapters, not the", ""),
    ({"ids": ["a", "b\n"]}, "`merged_adapters.ids` must be at most 512 printable", ""),
    ({"weights": None}, "`merged_adapters.weights` is required", "merged_adapters.weights"),
    (
        {"weights": [1]},
        "`merged_adapters.weights` must be a list of 2 numbers, got a list of 1",
        "",
    ),
    ({"weights": [1, "2"]}, "`merged_adapters.weights` must be numbers between -1000 and 1000", ""),
    ({"weights": [1, True]}, "`merged_adapters.weights` must be numbers between -1000", ""),
    ({"weights": [1, 1001]}, "`merged_adapters.weights` must be numbers between -1000", ""),
    ({"merge_strategy": "cat"}, "`merged_adapters.merge_strategy` must be one of linear, ties", ""),
    ({"merge_strategy": "ties"}, "`merged_adapters.density` is required", ""),
    (
        {"merge_strategy": "ties", "density": 0},
        "`merged_adapters.density` must be a number > 0",
        "",
    ),
    ({"merge_strategy": "ties", "density": 1.1}, "`merged_adapters.density` must be a number", ""),
    ({"density": -0.1}, "`merged_adapters.density` must be a number between 0 and 1", ""),
    ({"majority_sign_method": "all"}, "`merged_adapters.majority_sign_method` must be one of", ""),
    ({"ids": ["a" * 500] * 9, "weights": [1] * 9}, "`merged_adapters`: the recipe of a merge", ""),
]


async def test_bad_merges_are_named_with_their_range() -> None:
    async with serving() as service:
        for change, said, field in BAD:
            merge = MERGE | change if isinstance(change, dict) and change else change
            body: dict[str, Any] = {"inputs": "abc", "parameters": {"merged_adapters": merge}}
            for path in ("/generate", "/generate_stream", "/"):
                answer = await service.json(path, body, status=422)
                assert answer["error"].startswith(said), answer
                assert answer["error_type"] == "validation"
            body = {"model": "fake", "prompt": "abc", "merged_adapters": merge}
            answer = await service.json("/v1/completions", body, status=422)
            assert answer["error"]["message"].startswith(said)
            assert answer["error"]["param"].startswith(field or "merged_adapters")
        assert not service.shard.fetches
        both = {"adapter_id": "adapter-1", "merged_adapters": MERGE}
        answer = await service.json("/generate", {"inputs": "a", "parameters": both}, status=422)
        said = "at most one of `adapter_id` and `merged_adapters` may name an adapter"
        assert answer["error"] == said
        named = {"adapter_id": "linear(1*local:a)", "adapter_source": "merged"}
        answer = await service.json("/generate", {"inputs": "a", "parameters": named}, status=422)
        assert answer["error"] == "`adapter_id`: between 2 and 16 adapters can be merged, got 1"


@pytest.mark.parametrize(
    ("name", "status"),
    [("missing", 404), ("nobody", 404), ("broken", 422), ("down", 502), ("private-1", 403)],
)
async def test_a_members_error_is_the_answer(name: str, status: int) -> None:
    async with serving() as service:
        merge = {"ids": ["adapter-1", name], "weights": [1, 1]}
        body = {"inputs": "abc", "parameters": {"merged_adapters": merge}}
        answer = await service.json("/generate", body, status=status)
        assert name in answer["error"] or status == 502


async def test_operators_load_name_list_and_drop_merges() -> None:
    async with serving() as service:
        asked = {"merged_adapters": MERGE, "alias": "mix", "pin": "host"}
        answer = await service.json("/v1/adapters", asked)
        assert (answer["id"], answer["source"], answer["tier"]) == (KEY.id, "merged", "host")
        assert (answer["pinned"], answer["aliases"]) == ("host", ["mix"])
        assert await fetched(service, adapter_id="mix") == []
        merge = {"ids": ["mix", "adapter-1"], "weights": [1, 1]}
        body = {"inputs": "a", "parameters": {"merged_adapters": merge}}
        said = (await service.json("/generate", body, status=422))["error"]
        assert said == "`merged_adapters`: a merged adapter cannot be merged again"
        models = await (await service.client.get("/v1/models")).json()
        ids = {model["id"] for model in models["data"]}
        assert ids == {"fake", "adapter-1", "adapter-2", "mix"}
        path = f"/v1/adapters/{quote(KEY.id, safe='')}?adapter_source=merged"
        response = await service.client.delete(path)
        assert (await response.json())["deleted"] is True
        assert KEY not in service.shard.adapters


async def test_a_merge_is_for_those_who_may_use_every_member() -> None:
    key = merge_of(hub("adapter-1"), hub("private-2"))
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            (await directory.acquire(key, SECRET)).close()
            for token in ("", "wrong"):
                with pytest.raises(AdapterForbidden, match="private-2"):
                    await directory.acquire(key, token)
            (await directory.acquire(key, SECRET)).close()
            with pytest.raises(AdapterNotFound, match="nobody"):
                await directory.acquire(merge_of(hub("adapter-1"), hub("nobody")), SECRET)


async def begin_anew(
    directory: AdapterDirectory, shard: FakeShard
) -> tuple[AdapterKey, AdapterPin, asyncio.Task[AdapterPin]]:
    """A merge, pinned and in use, and a request that comes after a member has changed."""
    member = hub("adapter-2")
    key = merge_of(hub("adapter-1"), member)
    old = await directory.acquire(key, "")
    directory.tiers.keep(old.adapter.content)
    shard.contents[member.id] = "new digest"
    await directory.drop(member)
    return key, old, asyncio.create_task(directory.acquire(key, ""))


async def test_a_merge_is_made_anew_when_a_member_has_changed() -> None:
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, dropped):
            key, old, coming = await begin_anew(directory, shard)
            new = await coming  # running requests finish on what they began with
            assert new.adapter.info.digest == "digest of adapter-1 + new digest"
            assert old.adapter not in dropped
            assert directory.tiers.host.is_kept(new.adapter.content)
            assert (await directory.acquire(key, "")).adapter is new.adapter
            old.close()
            await until(lambda: old.adapter.content not in directory.tiers.host)
            assert old.adapter in dropped
            assert shard.superseded == {}


async def test_a_merge_is_reloaded_with_its_members() -> None:
    members = hub("adapter-1"), hub("adapter-2")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            old = await directory.acquire(merge_of(*members), "")
            shard.contents["adapter-2"] = "new digest"
            (await directory.acquire(merge_of(*members), "")).close()
            assert directory.find(merge_of(*members)) is old.adapter
            new = await directory.reload(merge_of(*members), "")
            assert new.info.digest == "digest of adapter-1 + new digest"
            old.close()


async def test_the_callers_token_is_for_the_members() -> None:
    async with serving() as service:
        merge = {"ids": ["private-1", "adapter-1"], "weights": [1, 1]}
        chosen = {"merged_adapters": merge, "adapter_source": "hub", "max_new_tokens": 1}
        await service.generate("abc", **chosen, api_token=SECRET)
        body = {"inputs": "abc", "parameters": chosen}
        await service.json("/generate", body, Authorization=f"Bearer {SECRET}")
        await service.json("/generate", body, status=403)
        elsewhere = {"merged_adapters": MERGE, "api_token": SECRET, "max_new_tokens": 1}
        service.shard.fetches.clear()
        await service.generate("abc", **elsewhere)
        assert {fetch.api_token for fetch in service.shard.fetches} == {""}


async def test_a_drop_ends_the_pin_of_a_merge_that_is_being_made_anew() -> None:
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            key, old, coming = await begin_anew(directory, shard)
            dropping = asyncio.create_task(directory.drop(key))
            await asyncio.sleep(0)
            old.close()
            await dropping
            (await coming).close()
            assert not directory.tiers.is_kept(key)


@pytest.mark.parametrize("is_loaded", [False, True])
async def test_members_that_were_evicted_meanwhile_are_not_left_uncounted(is_loaded: bool) -> None:
    members = [hub("adapter-0"), hub("adapter-3")]
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            for member in members:
                await directory.validate(member, "")
            await directory.tiers.drop(members[0])  # as others' evictions may
            if is_loaded:
                (await directory.acquire(merge_of(*members), "")).close()
            else:
                await directory.validate(merge_of(*members), "")
            on_disk = {key for key, info in shard.adapters.items() if info.disk_bytes}
            assert on_disk == set(directory.tiers.disk) == {members[1], merge_of(*members)}
