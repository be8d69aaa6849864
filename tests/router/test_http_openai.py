"""OpenAI's routes: fields, shapes, chunks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fake_model import fake_logprob
from tests.fakes import FakeConfig
from tests.router.http_service import Running, parse_frames, serving

PROMPT = "hello world! "
COMPLETION = {"model": "fake", "prompt": PROMPT, "max_tokens": 5}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
CHAT_PROMPT = "<s>[user] hi\n[assistant] "  # <s> is one token without text


async def test_a_completion() -> None:
    async with serving() as service:
        response = await service.post("/v1/completions", COMPLETION)
        answer = await response.json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 13, "completion_tokens": 5, "total_tokens": 18},
    }
    assert response.headers["x-generated-tokens"] == "5"
    assert response.headers["x-model-id"] == "fake"


async def test_a_chat_completion() -> None:
    async with serving() as service:
        answer = await service.json("/v1/chat/completions", CHAT)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    message = {"role": "assistant", "content": CHAT_PROMPT[3:11], "refusal": None}
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 23, "completion_tokens": 9, "total_tokens": 32},
    }


async def test_a_completion_stream() -> None:
    async with serving() as service:
        body = COMPLETION | {"stream": True}
        raw = await (await service.post("/v1/completions", body)).text()
        assert raw.startswith('data: {"id":"cmpl-')
        assert raw.endswith("data: [DONE]\n\n")
        *chunks, done = parse_frames(raw)
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == [*"hello", ""]
    assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]


async def test_a_chat_stream() -> None:
    async with serving() as service:
        *chunks, done = await service.frames("/v1/chat/completions", CHAT | {"stream": True})
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    text = "".join(choice["delta"]["content"] for choice in choices[1:-1])
    assert text == CHAT_PROMPT[3:11]
    assert all("role" not in choice["delta"] for choice in choices[1:])


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
)
async def test_usage_of_a_stream_comes_in_a_last_chunk(path: str, body: dict[str, Any]) -> None:
    async with serving() as service:
        whole = await service.json(path, body)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage, done = await service.frames(path, body | options)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert usage["id"] == chunks[0]["id"]


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [("wor", "hello ", 9), (["zzz", "o w", "!"], "hell", 7), (["d!x"], "hello world! ", 13)],
)
async def test_stop_strings_are_cut_off(stop: str | list[str], text: str, tokens: int) -> None:
    body = COMPLETION | {"stop": stop, "max_tokens": 13}
    async with serving() as service:
        whole = await service.json("/v1/completions", body)
        *chunks, _ = await service.frames("/v1/completions", body | {"stream": True})
    reason = "length" if stop == ["d!x"] else "stop"
    [choice] = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)
    assert whole["usage"]["completion_tokens"] == tokens
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == text
    assert choices[-1]["finish_reason"] == reason
    if reason == "length":  # "d!" was held until it turned out not to be the stop string
        assert "d! " in [choice["text"] for choice in choices]


async def test_eos_is_stop_and_has_no_text() -> None:
    async with serving(FakeConfig(echo=True, eos_after=4)) as service:
        whole = await service.json("/v1/completions", COMPLETION | {"logprobs": 0})
        more = await service.json("/v1/completions", COMPLETION | {"ignore_eos_token": True})
    [choice] = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hel", "stop")
    assert choice["logprobs"]["tokens"] == ["h", "e", "l"]
    assert whole["usage"]["completion_tokens"] == 4
    assert more["choices"][0]["finish_reason"] == "length"


async def test_completion_logprobs_and_echo() -> None:
    body = {"model": "", "prompt": "ab", "max_tokens": 2, "logprobs": 2, "echo": True}
    async with serving() as service:
        whole = await service.json("/v1/completions", body)
        *chunks, _ = await service.frames("/v1/completions", body | {"stream": True})
    assert whole["model"] == "fake"
    [choice] = whole["choices"]
    assert choice["text"] == "abab"
    logprobs = choice["logprobs"]
    a, b = fake_logprob(3 + ord("a") - 32), fake_logprob(3 + ord("b") - 32)
    assert logprobs["tokens"] == ["a", "b", "a", "b"]
    assert logprobs["token_logprobs"] == [None, b, a, b]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"][:2] == [None, None]
    assert logprobs["top_logprobs"][2] == {"a": a, "b": a - 1}
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name, values in logprobs.items():
        assert [value for part in streamed if part for value in part[name]] == values


async def test_chat_logprobs() -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    body["messages"] = [{"role": "user", "content": "é"}]
    async with serving() as service:
        whole = await service.json("/v1/chat/completions", body)
        *chunks, _ = await service.frames("/v1/chat/completions", body | {"stream": True})
    content = whole["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["<s>", "[", "u"]
    assert [entry["bytes"] for entry in content] == [list(b"<s>"), [91], [117]]
    assert [entry["token"] for entry in content[1]["top_logprobs"]] == ["[", "\\"]
    assert content[1]["logprob"] == content[1]["top_logprobs"][0]["logprob"]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in streamed if part for entry in part["content"]] == content


async def test_several_prompts_and_choices() -> None:
    body = {"model": "fake", "prompt": ["ab", "xyz"], "max_tokens": 3, "n": 2}
    async with serving() as service:
        whole = await service.json("/v1/completions", body)
        *chunks, done = await service.frames(
            "/v1/completions",
            body | {"stream": True, "stream_options": {"include_usage": True}},
        )
        seeds = [start.sampling.seed for plan in service.shard.plans for start in plan.starts]
    texts = ["aba", "aba", "xyz", "xyz"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in whole["choices"]] == texts
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert chunks[-1]["usage"] == whole["usage"]
    assert done == "[DONE]"
    streamed = ["", "", "", ""]
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts
    assert len(set(seeds[:2])) == 2, "each choice has a seed of its own"


async def test_token_ids_as_prompts() -> None:
    ids = [3 + ord(letter) - 32 for letter in "hey"]
    body = {"model": "fake", "max_tokens": 3, "echo": True}
    async with serving() as service:
        one = await service.json("/v1/completions", body | {"prompt": ids})
        two = await service.json("/v1/completions", body | {"prompt": [ids, ids[:1]]})
    assert one["choices"][0]["text"] == "heyhey"
    assert [choice["text"] for choice in two["choices"]] == ["heyhey", "hhhh"]


async def test_best_of_returns_the_likeliest() -> None:
    async with serving(FakeConfig()) as service:
        body = COMPLETION | {"n": 1, "best_of": 3}
        answer = await service.json("/v1/completions", body)
        starts = [start for plan in service.shard.plans for start in plan.starts]
    assert [choice["index"] for choice in answer["choices"]] == [0]
    assert len(starts) == 3
    assert answer["usage"]["completion_tokens"] == 15


async def test_n_choices_of_a_chat() -> None:
    async with serving() as service:
        answer = await service.json("/v1/chat/completions", CHAT | {"n": 3})
        frames = await service.frames("/v1/chat/completions", CHAT | {"n": 2, "stream": True})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    roles = [f for f in frames[:-1] if "role" in f["choices"][0]["delta"]]
    assert sorted(frame["choices"][0]["index"] for frame in roles) == [0, 1]


async def test_the_model_names_the_adapter() -> None:
    async with serving(FakeConfig()) as service:
        named = await service.post("/v1/completions", COMPLETION | {"model": "adapter-1"})
        answer = await named.json()
        same = await service.generate(PROMPT, adapter_id="adapter-1", max_new_tokens=5)
        hub = await service.post(
            "/v1/completions", COMPLETION | {"model": "adapter-1", "adapter_source": "hub"}
        )
    assert answer["model"] == "adapter-1"
    assert answer["choices"][0]["text"] == same["generated_text"]
    assert named.headers["x-adapter-id"] == "adapter-1"
    assert hub.headers["x-adapter-source"] == "hub"


async def test_sampling_defaults_and_extras() -> None:
    async with serving() as service:
        for extra in (
            {},
            {"temperature": 0},
            {"top_k": -1, "seed": -1, "repetition_penalty": 2.0, "top_p": 0.5},
        ):
            await service.json("/v1/completions", COMPLETION | extra)
        starts = [start.sampling for plan in service.shard.plans for start in plan.starts]
    default, greedy, extras = starts
    assert (default.temperature, greedy.temperature) == (1.0, 0.0)
    assert 0 <= default.seed < 2**63
    assert greedy.seed == 0
    assert (extras.top_k, extras.seed, extras.repetition_penalty) == (0, 2**64 - 1, 2.0)


async def test_token_limits() -> None:
    async with serving(FakeConfig(echo=True, max_model_len=40)) as service:
        both = CHAT | {"max_tokens": 9, "max_completion_tokens": 2}
        newer = await service.json("/v1/chat/completions", both)
        unlimited = {key: value for key, value in CHAT.items() if key != "max_tokens"}
        filled = await service.json("/v1/chat/completions", unlimited)
        default = await service.json("/v1/completions", {"model": "fake", "prompt": "ab"})
    assert newer["usage"]["completion_tokens"] == 2
    assert filled["usage"]["total_tokens"] == 40
    assert default["usage"]["completion_tokens"] == 16


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("completions", {"model": None}, "`model` is required", "model"),
    ("completions", {"prompt": None}, "`prompt` is required", "prompt"),
    ("completions", {"prompt": []}, "`prompt` must be a string, a list", "prompt"),
    ("completions", {"prompt": [1, 9999]}, "`prompt` must be token ids between 0", "prompt"),
    ("completions", {"prompt": [True]}, "`prompt` must be token ids", "prompt"),
    ("completions", {"prompt": ["a", 1]}, "`prompt` must be a string, a list", "prompt"),
    ("completions", {"prompt": [[]]}, "`prompt` must have at least 1 token", "prompt"),
    ("completions", {"prompt": ""}, "`prompt` must have at least 1 token", "prompt"),
    ("completions", {"max_tokens": 0}, "`max_tokens` must be an integer", "max_tokens"),
    ("completions", {"temperature": 2.5}, "`temperature` must be a number", "temperature"),
    ("completions", {"logprobs": 21}, "`logprobs` must be an integer between 0", "logprobs"),
    ("completions", {"logprobs": True}, "`logprobs` must be an integer between 0", "logprobs"),
    ("completions", {"n": 5}, "`n` must be an integer between 1 and 4, got 5", "n"),
    ("completions", {"n": 3, "best_of": 2}, "`best_of` must be an integer between 3", "best_of"),
    ("completions", {"best_of": 2, "stream": True}, "`best_of` must equal `n`", "best_of"),
    ("completions", {"stop": ["a"] * 17}, "`stop` must be a string or a list", "stop"),
    ("completions", {"suffix": "x"}, "`suffix` is not supported yet", "suffix"),
    ("completions", {"logit_bias": {"1": 2}}, "`logit_bias` is not supported", "logit_bias"),
    ("chat/completions", {"messages": []}, "`messages` must be a non-empty list", "messages"),
    ("chat/completions", {"tools": [{}]}, "`tools` is not supported yet", "tools"),
    (
        "chat/completions",
        {"merged_adapters": {"ids": []}},
        "`merged_adapters.ids` must have between 2 and 16 adapters",
        "merged_adapters.ids",
    ),
    (
        "chat/completions",
        {"response_format": {"type": "json_object"}},
        "`response_format` other than text is not supported yet",
        "response_format",
    ),
    ("chat/completions", {"top_logprobs": 2}, "`top_logprobs` needs `logprobs`", "top_logprobs"),
    (
        "chat/completions",
        {"messages": [{"role": "pirate", "content": "x"}]},
        "the chat template refuses these messages: unknown role pirate",
        "messages",
    ),
]


async def test_bad_fields_are_named() -> None:
    async with serving() as service:
        for route, change, said, param in BAD:
            body = COMPLETION if route == "completions" else CHAT
            answer = await service.json(f"/v1/{route}", body | change, status=422)
            error = answer["error"]
            assert error["message"].startswith(said), answer
            assert (error["type"], error["param"]) == ("invalid_request_error", param)
            assert error["code"] is None


async def test_errors_have_openais_shape() -> None:
    async with serving(FakeConfig(echo=True, max_model_len=18)) as service:
        missing = await service.json("/v1/completions", COMPLETION | {"model": "no"}, status=404)
        broken = await service.json("/v1/completions", COMPLETION | {"model": "broken"}, status=422)
        long = await service.json("/v1/completions", COMPLETION | {"max_tokens": 6}, status=422)
        unknown = await service.json("/v1/responses", {}, status=404)
    assert missing["error"] == {
        "message": "there is no adapter no",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert broken["error"]["code"] == "adapter_unservable"
    assert long["error"]["code"] == "context_length_exceeded"
    assert "at most 18" in long["error"]["message"]
    assert unknown["error"]["message"] == "404 Not Found"


async def test_text_response_format_and_empty_extras_pass() -> None:
    extras = {"response_format": {"type": "text"}, "tools": [], "logit_bias": {}, "user": "u"}
    async with serving() as service:
        answer = await service.json("/v1/chat/completions", CHAT | extras)
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_models_lists_the_base_and_known_adapters() -> None:
    async with serving() as service:
        before = await _models(service)
        await service.generate("abc", adapter_id="adapter-2", max_new_tokens=1)
        after = await _models(service)
    assert [model["id"] for model in before] == ["fake"]
    assert before[0]["parent"] is None
    assert before[0]["max_model_len"] == 2048
    assert [(model["id"], model["parent"]) for model in after[1:]] == [("adapter-2", "fake")]
    assert after[1]["source"] == "local"
    assert after[1]["tier"] == "device"
    assert after[1]["rank"] > 0
    assert {model["object"] for model in after} == {"model"}


async def _models(service: Running) -> list[dict[str, Any]]:
    answer = await (await service.client.get("/v1/models")).json()
    assert answer["object"] == "list"
    data: list[dict[str, Any]] = answer["data"]
    return data
