"""LoRAX's routes: fields, shapes, streams."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import unquote

import pytest

from lorafleet.proto.messages import AdapterKey
from lorafleet.router.answer import served_by
from tests.fake_model import EOS_ID, FakeModel, fake_logprob
from tests.fakes import SECRET, FakeConfig
from tests.router.http_service import serving

PROMPT = "hello world! "


async def test_generate_with_details() -> None:
    async with serving() as service:
        response = await service.post(
            "/generate",
            {"inputs": PROMPT, "parameters": {"max_new_tokens": 5, "details": True}},
        )
        answer = await response.json()
    assert answer["generated_text"] == "hello"
    details = answer["details"]
    assert details["finish_reason"] == "length"
    assert (details["prompt_tokens"], details["generated_tokens"]) == (13, 5)
    assert details["seed"] is None
    assert details["prefill"] == []
    assert [token["text"] for token in details["tokens"]] == list("hello")
    token = details["tokens"][0]
    assert token["logprob"] == fake_logprob(token["id"])
    assert (token["special"], token["skipped"]) == (False, False)
    assert response.headers["x-model-id"] == "fake"
    assert response.headers["x-prompt-tokens"] == "13"
    assert response.headers["x-generated-tokens"] == "5"
    assert response.headers["x-total-tokens"] == "18"
    for name in ("total-time", "queue-time", "inference-time", "validation-time", "time-per-token"):
        assert float(response.headers[f"x-{name}"]) >= 0
    assert float(response.headers["x-time-to-first-token"]) >= 0
    assert "x-adapter-id" not in response.headers


async def test_details_are_left_out_unless_asked() -> None:
    async with serving() as service:
        assert await service.generate(PROMPT, max_new_tokens=3) == {"generated_text": "hel"}


async def test_the_root_answers_with_a_list_or_a_stream() -> None:
    async with serving() as service:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
        assert await service.json("/", body) == [{"generated_text": "hel"}]
        frames = await service.frames("/", body | {"stream": True})
    assert [frame["token"]["text"] for frame in frames] == list("hel")


async def test_stream_frames() -> None:
    async with serving() as service:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "details": True, "seed": 1}}
        response = await service.post("/generate_stream", body)
        raw = await response.text()
        assert raw.startswith('data:{"token"')
        frames = await service.frames("/generate_stream", body)
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["x-prompt-tokens"] == "13"
    assert "x-queue-time" in response.headers
    assert "x-time-to-first-token" in response.headers
    *first, last = frames
    assert all(frame["generated_text"] is None and frame["details"] is None for frame in first)
    assert last["generated_text"] == "".join(frame["token"]["text"] for frame in frames) == "hell"
    assert last["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 13,
        "generated_tokens": 4,
        "seed": None,
    }


async def test_characters_come_whole_and_text_adds_up() -> None:
    prompt = "größe 🎉 "
    num_tokens = len(prompt.encode())
    async with serving() as service:
        frames = await service.frames(
            "/generate_stream", {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens}}
        )
        cut = await service.frames(
            "/generate_stream", {"inputs": prompt, "parameters": {"max_new_tokens": 10}}
        )
    texts = [frame["token"]["text"] for frame in frames]
    assert "".join(texts) == frames[-1]["generated_text"] == prompt
    assert "🎉" in texts
    assert "\ufffd" not in "".join(texts)
    assert cut[-1]["generated_text"] == "größe \ufffd"
    assert "\ufffd" not in "".join(frame["token"]["text"] for frame in cut[:-1])


async def test_eos_ends_without_text() -> None:
    async with serving(FakeConfig(echo=True, eos_after=4)) as service:
        answer = await service.generate(PROMPT, details=True)
        frames = await service.frames("/generate_stream", {"inputs": PROMPT})
        more = await service.generate(PROMPT, details=True, ignore_eos_token=True, max_new_tokens=6)
    assert answer["generated_text"] == "hel"
    assert answer["details"]["finish_reason"] == "eos_token"
    last = answer["details"]["tokens"][-1]
    assert (last["id"], last["text"], last["special"]) == (EOS_ID, "", True)
    assert frames[-1]["token"]["special"] is True
    assert frames[-1]["generated_text"] == "hel"
    assert more["details"]["finish_reason"] == "length"
    assert more["generated_text"] == "hel"


@pytest.mark.parametrize(
    ("stop", "text", "generated"),
    [(["wor"], "hello wor", 9), (["zzz", "o"], "hello", 5), (["zzz"], "hello world! ", 13)],
)
async def test_stop_strings_end_the_text(stop: list[str], text: str, generated: int) -> None:
    async with serving() as service:
        parameters = {"stop": stop, "max_new_tokens": 13, "details": True}
        answer = await service.generate(PROMPT, **parameters)
        frames = await service.frames(
            "/generate_stream", {"inputs": PROMPT, "parameters": parameters}
        )
        service.engine.check()
    reason = "length" if stop == ["zzz"] else "stop_sequence"
    assert answer["generated_text"] == frames[-1]["generated_text"] == text
    assert answer["details"]["finish_reason"] == frames[-1]["details"]["finish_reason"] == reason
    assert answer["details"]["generated_tokens"] == len(frames) == generated


async def test_the_prompt_in_full_and_its_logprobs() -> None:
    async with serving() as service:
        answer = await service.generate(
            "abc", max_new_tokens=3, return_full_text=True, decoder_input_details=True
        )
    assert answer["generated_text"] == "abcabc"
    prefill = answer["details"]["prefill"]
    assert [token["text"] for token in prefill] == list("abc")
    expected = [None, *(fake_logprob(token["id"]) for token in prefill[1:])]
    assert [token["logprob"] for token in prefill] == expected


async def test_truncate_keeps_the_end() -> None:
    async with serving() as service:
        answer = await service.generate("hello world", truncate=5, max_new_tokens=5, details=True)
    assert answer["generated_text"] == "world"
    assert answer["details"]["prompt_tokens"] == 5


async def test_truncate_makes_a_long_prompt_fit() -> None:
    async with serving(max_input_length=8) as service:
        answer = await service.generate("hello world", truncate=5, max_new_tokens=5)
    assert answer["generated_text"] == "world"


async def test_alternatives() -> None:
    async with serving() as service:
        parameters = {"return_k_alternatives": 3, "max_new_tokens": 2, "details": True}
        answer = await service.generate("abc", **parameters)
        frames = await service.frames(
            "/generate_stream", {"inputs": "abc", "parameters": parameters}
        )
    alternatives = answer["details"]["tokens"][0]["alternative_tokens"]
    assert [token["text"] for token in alternatives] == ["a", "b", "c"]
    assert frames[0]["token"]["alternative_tokens"] == alternatives


async def test_sampling_draws_and_reports_a_seed() -> None:
    async with serving() as service:
        drawn = await service.generate("abc", do_sample=True, max_new_tokens=1, details=True)
        again = await service.generate("abc", top_k=3, max_new_tokens=1, details=True)
        given = await service.generate(
            "abc", temperature=0.5, seed=7, max_new_tokens=1, details=True
        )
        greedy = await service.generate("abc", temperature=0, max_new_tokens=1, details=True)
        starts = [start.sampling for plan in service.shard.plans for start in plan.starts]
    seeds = [answer["details"]["seed"] for answer in (drawn, again, given, greedy)]
    assert seeds[2:] == [7, None]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**63 for seed in seeds[:2])
    assert [sampling.temperature for sampling in starts] == [1.0, 1.0, 0.5, 0.0]
    assert [sampling.seed for sampling in starts] == [*seeds[:3], 0]
    assert starts[1].top_k == 3


async def test_every_sampling_field_reaches_the_shard() -> None:
    fields = {
        "temperature": 0.75,
        "top_k": 5,
        "top_p": 0.5,
        "typical_p": 0.25,
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 2.0,
        "seed": 2**64 - 1,
    }
    async with serving() as service:
        await service.generate("abc", max_new_tokens=1, **fields)
        [sampling] = [start.sampling for plan in service.shard.plans for start in plan.starts]
    assert {name: getattr(sampling, name) for name in fields} == fields


async def test_best_of_gives_the_likeliest_first() -> None:
    async with serving(FakeConfig()) as service:
        answer = await service.generate(
            "abc", best_of=3, do_sample=True, max_new_tokens=4, details=True, seed=5
        )
        starts = [start.sampling.seed for plan in service.shard.plans for start in plan.starts]
    details = answer["details"]
    others = details["best_of_sequences"]
    assert len(others) == 2
    assert {details["seed"], *(other["seed"] for other in others)} == set(starts)
    assert len(set(starts)) == 3
    assert 5 in starts
    means = [_mean_logprob(sequence) for sequence in (details, *others)]
    assert means == sorted(means, reverse=True)
    assert all(other["generated_text"] and other["tokens"] for other in others)


def _mean_logprob(sequence: dict[str, Any]) -> float:
    logprobs = [token["logprob"] for token in sequence["tokens"]]
    return math.fsum(logprobs) / len(logprobs)


async def test_the_adapter_decides_the_tokens() -> None:
    model = FakeModel()
    async with serving(FakeConfig()) as service:
        for name in ("adapter-1", "adapter-2"):
            response = await service.post(
                "/generate",
                {
                    "inputs": "abc",
                    "parameters": {"adapter_id": name, "max_new_tokens": 6, "details": True},
                },
            )
            answer = await response.json()
            ids = [token["id"] for token in answer["details"]["tokens"]]
            prompt = [3 + ord(letter) - 32 for letter in "abc"]
            assert ids == model.expected_tokens(prompt, 6, AdapterKey("local", name))
            assert response.headers["x-adapter-id"] == name
            assert response.headers["x-adapter-source"] == "local"
        base = await service.generate("abc", adapter_id="__base_model__", max_new_tokens=6)
        assert base == await service.generate("abc", adapter_id="", max_new_tokens=6)


async def test_headers_hold_any_adapter_id() -> None:
    async with serving() as service:
        for stream in (False, True):
            response = await service.post(
                "/",
                {"inputs": "a", "stream": stream, "parameters": {"adapter_id": "größe/🎉"}},
            )
            assert response.status == 404
            assert "größe/🎉" in (await response.json())["error"]


def test_header_values_are_ascii() -> None:
    headers = served_by("modèle", AdapterKey("local", "größe/🎉 100%\n"))
    assert headers == {
        "x-model-id": "mod%C3%A8le",
        "x-adapter-id": "gr%C3%B6%C3%9Fe/%F0%9F%8E%89%20100%25%0A",
        "x-adapter-source": "local",
    }


@pytest.mark.parametrize(
    ("adapter", "status", "error_type"),
    [
        ("missing", 404, "adapter_not_found"),
        ("broken", 422, "adapter_unservable"),
        ("private-1", 403, "adapter_forbidden"),
        ("down", 502, "adapter_source_unavailable"),
        ("slow", 504, "adapter_source_timeout"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_adapter_errors_have_a_status_even_in_streams(
    path: str, adapter: str, status: int, error_type: str
) -> None:
    async with serving() as service:
        body = {"inputs": "abc", "parameters": {"adapter_id": adapter}}
        answer = await service.json(path, body, status=status)
    assert answer["error_type"] == error_type
    assert answer["error"]


@pytest.mark.parametrize(("adapter", "status"), [("down", 502), ("slow", 504), ("missing", 404)])
async def test_a_remembered_failure_says_so_and_when_to_come_again(
    adapter: str, status: int
) -> None:
    async with serving() as service:
        chosen = {"adapter_id": adapter, "adapter_source": "hub", "api_token": SECRET}
        body = {"inputs": "abc", "parameters": chosen}
        for words in ("", "Remembered"):
            response = await service.post("/generate", body)
            assert response.status == status
            assert response.headers.get("Retry-After") == ("1" if status >= 500 else None)
            error = (await response.json())["error"]
            assert words in error
            assert SECRET not in error
        assert len(service.shard.fetches) == 1


@pytest.mark.parametrize(
    ("source", "name", "key"),
    [
        ("hub", "adapter-1", AdapterKey("hub", "adapter-1")),
        ("hub", "adapter-1@refs/pr/1", AdapterKey("hub", "adapter-1", "refs/pr/1")),
        ("s3", "s3://b/a@1", AdapterKey("s3", "s3://b/a@1")),
        ("http", "https://host/a@1.zip", AdapterKey("http", "https://host/a@1.zip")),
        ("local", "adapter-1@v1", AdapterKey("local", "adapter-1@v1")),
    ],
)
async def test_a_revision_is_the_hubs_only(source: str, name: str, key: AdapterKey) -> None:
    async with serving() as service:
        chosen = {"adapter_id": name, "adapter_source": source, "max_new_tokens": 1}
        body = {"inputs": "abc", "parameters": chosen}
        response = await service.post("/generate", body)
        if response.status == 200:
            assert unquote(response.headers["x-adapter-id"]) == name
        assert service.shard.fetches[0].key == key


async def test_api_tokens_go_to_the_hub_only() -> None:
    async with serving() as service:
        remote = {"adapter_id": "private-1", "adapter_source": "HUB", "max_new_tokens": 1}
        body = {"inputs": "abc", "parameters": remote}
        await service.json("/generate", body, Authorization=f"Bearer {SECRET}")
        await service.json(
            "/generate", {"inputs": "abc", "parameters": remote | {"api_token": SECRET}}
        )
        await service.json("/generate", body, status=403, Authorization="Bearer EMPTY")
        local = {"adapter_id": "adapter-1", "api_token": SECRET, "max_new_tokens": 1}
        await service.json("/generate", {"inputs": "abc", "parameters": local})
        for source in ("s3", "http"):
            other = local | {"adapter_source": source}
            await service.json("/generate", {"inputs": "abc", "parameters": other})
        tokens = {(fetch.key.source, fetch.api_token) for fetch in service.shard.fetches}
    assert tokens == {("hub", SECRET), ("hub", ""), ("local", ""), ("s3", ""), ("http", "")}


BAD_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "`temperature` must be a number between 0 and 100, got -0.1"),
    ({"temperature": "hot"}, "`temperature` must be a number between 0 and 100, got 'hot'"),
    ({"temperature": True}, "`temperature` must be a number between 0 and 100, got true"),
    ({"top_p": 0}, "`top_p` must be a number > 0 and <= 1, got 0"),
    ({"top_p": 1.01}, "`top_p`"),
    ({"typical_p": 0.0}, "`typical_p` must be a number > 0 and <= 1, got 0.0"),
    ({"top_k": 0}, "`top_k` must be an integer between 1 and 2147483647, got 0"),
    ({"top_k": 1.0}, "`top_k`"),
    ({"top_k": True}, "`top_k`"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be a number > 0 and <= 100"),
    ({"frequency_penalty": -2.5}, "`frequency_penalty` must be a number between -2 and 2"),
    ({"presence_penalty": 3}, "`presence_penalty` must be a number between -2 and 2"),
    ({"seed": -1}, "`seed` must be an integer between 0 and 18446744073709551615, got -1"),
    ({"seed": 10**400}, "`seed`"),
    ({"best_of": 5, "do_sample": True}, "`best_of` must be an integer between 1 and 4, got 5"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer between 1 and 2048, got 0"),
    ({"truncate": 0}, "`truncate` must be an integer between 1 and 2047"),
    ({"stop": ["a"] * 17}, "`stop` must be a string or a list of at most 16 strings"),
    ({"stop": [""]}, "`stop` must hold no empty string"),
    ({"stop": [1]}, "`stop` must be a string, got 1"),
    ({"return_k_alternatives": 21}, "`return_k_alternatives` must be an integer between 1 and 20"),
    ({"details": "yes"}, "`details` must be true or false, got 'yes'"),
    (
        {"adapter_source": "pbase"},
        "`adapter_source` must be one of local, hub, s3, http, merged, got 'pbase'",
    ),
    ({"adapter_id": 3}, "`adapter_id` must be a string, got 3"),
    ({"adapter_id": "a\nb"}, "`adapter_id` must be at most 512 printable characters"),
    ({"adapter_id": "a" * 513}, "`adapter_id`"),
    ({"api_token": 5}, "`api_token` must be a string"),
    ({"watermark": True}, "`watermark` is not supported"),
    ({"response_format": {"type": "json_object"}}, "`response_format` is not supported yet"),
    (
        {"max_new_tokens": 2046},
        "`inputs` tokens and `max_new_tokens` together must be at most 2048",
    ),
]


async def test_bad_parameters_are_named_with_their_range() -> None:
    async with serving() as service:
        greedy = {"inputs": "abc", "parameters": {"best_of": 2}}
        answer = await service.json("/generate", greedy, status=422)
        assert answer["error"] == "you must use sampling when `best_of` is > 1"
        for parameters, said in BAD_PARAMETERS:
            for path in ("/generate", "/generate_stream", "/"):
                answer = await service.json(
                    path, {"inputs": "abc", "parameters": parameters}, status=422
                )
                assert answer["error"].startswith(said), answer
                assert answer["error_type"] == "validation"
        streamed: dict[str, Any] = {"best_of": 2, "decoder_input_details": True}
        for name, value in streamed.items():
            parameters = {name: value, "do_sample": True}
            body = {"inputs": "abc", "parameters": parameters}
            answer = await service.json("/generate_stream", body, status=422)
            assert answer["error"].startswith(f"`{name}` must be")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "`inputs` is required"),
        ({"inputs": None}, "`inputs` is required"),
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({"inputs": 3}, "`inputs` must be a string, got 3"),
        ({"inputs": "\ud800"}, "`inputs` holds half of a surrogate pair"),
        ({"inputs": "a", "parameters": []}, "`parameters` must be an object, got a list of 0"),
        ({"inputs": "a", "tools": [{}]}, "`tools` is not supported yet"),
        ({"inputs": "a" * 2048}, "`inputs` must have at most 2047 tokens, got 2048"),
        ([], "the body must be a JSON object"),
    ],
)
async def test_bad_bodies(body: Any, said: str) -> None:
    async with serving() as service:
        answer = await service.json("/generate", body, status=422)
    assert answer["error"] == said


MISPLACED: dict[str, Any] = {
    "adapter_id": "pirate", "adapter_source": "hub", "api_token": "a", "merged_adapters": {},
    "timeout": 0.01, "priority": 0, "max_new_tokens": 3, "stop": [], "seed": "any", "top_k": 2,
    "temperature": 0, "do_sample": True, "best_of": 2, "details": False, "truncate": 1,
    "return_full_text": True, "decoder_input_details": True, "return_k_alternatives": 1,
    "ignore_eos_token": True, "repetition_penalty": 1, "watermark": False, "response_format": {},
}  # fmt: skip


async def test_a_parameter_beside_the_parameters_is_refused_not_ignored() -> None:
    async with serving() as service:
        for name, value in MISPLACED.items():
            for path in ("/generate", "/generate_stream", "/"):
                for beside in ({}, {"parameters": {"max_new_tokens": 1, name: None}}):
                    body = {"inputs": "abc", name: value} | beside
                    answer = await service.json(path, body, status=422)
                    assert answer == {
                        "error": f"`{name}` belongs in `parameters`",
                        "error_type": "validation",
                    }
        # What is missing from the parameters since it is misplaced is not the error.
        body = {"inputs": "abc", "do_sample": True, "parameters": {"best_of": 2}}
        answer = await service.json("/generate", body, status=422)
        assert answer["error"] == "`do_sample` belongs in `parameters`"
        assert not service.shard.plans


async def test_other_fields_beside_the_parameters_are_ignored() -> None:
    others: dict[str, Any] = {"colour": "red", "model": "m", "timeout": None, "stream": False}
    async with serving() as service:
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 3}} | others
        assert await service.json("/generate", body) == {"generated_text": "abc"}
        assert await service.json("/", body) == [{"generated_text": "abc"}]


async def test_unknown_fields_and_nulls_are_ignored() -> None:
    async with serving() as service:
        answer = await service.generate(
            "abc", max_new_tokens=3, colour="red", temperature=None, stop=None, best_of=None
        )
    assert answer == {"generated_text": "abc"}
