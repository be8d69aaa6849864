"""An adapter's own tokenizer, template and end of text, used for its requests and no others."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from lorafleet.proto.messages import AdapterKey, AdapterTokenizer
from lorafleet.router import child_process, prompt_forms, tokenizer_reader
from lorafleet.router.errors import AdapterUnservable
from lorafleet.router.prompt import max_total_tokens
from lorafleet.router.service import SERVICE
from lorafleet.router.tokenizer_reader import TokenizerReader
from tests import fake_tokenizer
from tests.fake_tokenizer import VOCAB_SIZE
from tests.fakes import FakeConfig
from tests.router.http_service import Running, serving

NEW = "<|new|>"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|new|>{{ m.content }}{% endfor %}"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}


def extended(*tokens: str) -> bytes:
    """The base's file with tokens added."""
    file = Tokenizer.from_str(fake_tokenizer.tokenizer_json().decode())
    file.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return file.to_str().encode()


def files(digest: str, tokenizer_json: bytes = b"", **config: Any) -> AdapterTokenizer:
    return AdapterTokenizer(digest, tokenizer_json, json.dumps(config).encode())


def ship(service: Running, number: int, what: AdapterTokenizer, vocab_size: int = 0) -> str:
    name = f"adapter-{number}"
    service.shard.tokenizers[name] = what
    service.shard.vocab_sizes[name] = vocab_size
    return name


async def test_added_tokens_go_in_and_out() -> None:
    async with serving() as service:
        name = ship(service, 1, files("a", extended(NEW)), VOCAB_SIZE + 1)
        own = await service.generate(NEW + "x", adapter_id=name, max_new_tokens=2, details=True)
        assert own["generated_text"] == NEW + "x"
        assert own["details"]["tokens"][0]["id"] == VOCAB_SIZE
        base = await service.generate(NEW + "x", max_new_tokens=8, details=True)
        assert base["generated_text"] == NEW + "x"
        assert own["details"]["tokens"][0]["text"] == NEW
        assert base["details"]["tokens"][0]["text"] == "<"
        body = {"model": name, "prompt": [VOCAB_SIZE, 60], "max_tokens": 1, "echo": True}
        answer = await service.json("/v1/completions", body | {"temperature": 0})
        assert answer["choices"][0]["text"].startswith(NEW)


async def test_token_ids_are_checked_against_whom_they_are_for() -> None:
    async with serving() as service:
        name = ship(service, 1, files("a", extended(NEW)), VOCAB_SIZE + 1)
        body = {"prompt": [VOCAB_SIZE], "max_tokens": 1}
        await service.json("/v1/completions", body | {"model": name})
        refused = await service.json("/v1/completions", body | {"model": "fake"}, status=422)
        assert f"between 0 and {VOCAB_SIZE - 1}" in refused["error"]["message"]
        body["prompt"] = [VOCAB_SIZE + 1]
        refused = await service.json("/v1/completions", body | {"model": name}, status=422)
        assert f"between 0 and {VOCAB_SIZE}" in refused["error"]["message"]
        # A tokenizer that has more tokens than the adapter's embedding.
        name = ship(service, 2, files("b", extended(NEW, "<|other|>")), VOCAB_SIZE + 1)
        parameters = {"adapter_id": name, "max_new_tokens": 1}
        refused = await service.json(
            "/generate", {"inputs": "<|other|>", "parameters": parameters}, status=422
        )
        assert "token ids between" in refused["error"]


async def test_a_template_of_its_own_and_the_bases_otherwise() -> None:
    async with serving() as service:
        name = ship(service, 1, files("a", extended(NEW), chat_template=TEMPLATE), VOCAB_SIZE + 1)
        answer = await service.json("/v1/chat/completions", CHAT | {"model": name})
        assert answer["choices"][0]["message"]["content"] == NEW + "h"  # after <s>
        assert answer["usage"]["prompt_tokens"] == 4
        plain = ship(service, 2, files("b", eos_token="</s>"))
        for model in (plain, "fake"):
            answer = await service.json("/v1/chat/completions", CHAT | {"model": model})
            assert answer["choices"][0]["message"]["content"] == "[u"
        forms = service.client.app[SERVICE].forms
        assert (await forms.of(None)) is forms.base


async def test_the_adapters_end_of_text_ends_its_texts_only() -> None:
    async with serving() as service:
        name = ship(service, 1, files("a", extended(NEW), eos_token=NEW), VOCAB_SIZE + 1)
        other = ship(service, 2, files("b", extended(NEW)), VOCAB_SIZE + 1)
        for adapter, length, reason in ((name, 2, "eos_token"), (other, 3, "length")):
            answer = await service.generate(
                f"x{NEW}y", adapter_id=adapter, max_new_tokens=3, details=True
            )
            assert answer["details"]["generated_tokens"] == length
            assert answer["details"]["finish_reason"] == reason


async def test_adapters_that_ship_the_same_share_it_and_old_ones_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_forms, "MAX_FORMS", 2)
    async with serving() as service:
        names = [ship(service, n, files("same", extended(NEW)), VOCAB_SIZE + 1) for n in range(3)]
        asked = (service.generate("a", adapter_id=name, max_new_tokens=1) for name in names)
        await asyncio.gather(*asked)
        assert service.shard.num_tokenizers_asked == 1
        for number in (3, 4):
            name = ship(service, number, files(f"another {number}", extended(NEW)))
            await service.generate("a", adapter_id=name, max_new_tokens=1)
        await service.generate("a", adapter_id=names[0], max_new_tokens=1)
        assert service.shard.num_tokenizers_asked == 4


@pytest.mark.parametrize(
    ("shipped", "said"),
    [
        (b'{"model": {"type": "none"}}', "is not a tokenizer"),
        (b"{}", "is not a tokenizer"),
    ],
)
async def test_what_is_no_tokenizer_is_refused(shipped: bytes, said: str) -> None:
    async with serving() as service:
        name = ship(service, 1, files("a", shipped))
        body = {"inputs": "a", "parameters": {"adapter_id": name, "max_new_tokens": 1}}
        refused = await service.json("/generate", body, status=422)
        assert said in refused["error"]
        assert refused["error_type"] == "adapter_unservable"
        await service.generate("a", max_new_tokens=1)


async def test_a_text_that_a_tokenizer_cannot_encode_is_refused() -> None:
    file = json.loads(extended(NEW))
    file["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    async with serving() as service:
        name = ship(service, 1, files("a", json.dumps(file).encode()))
        body = {"inputs": "b", "parameters": {"adapter_id": name, "max_new_tokens": 1}}
        refused = await service.json("/generate", body, status=422)
        assert "cannot encode this text" in refused["error"]


async def test_regular_expressions_that_may_never_end_are_refused() -> None:
    file = json.loads(extended(NEW))
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, file["pre_tokenizer"]]}
    async with serving() as service:
        name = ship(service, 1, files("a", json.dumps(file).encode()))
        body = {"inputs": "a", "parameters": {"adapter_id": name, "max_new_tokens": 1}}
        refused = await service.json("/generate", body, status=422)
        assert "(a+)+$" in refused["error"]
        split["pattern"] = {"Regex": r"\p{N}{1,3}"}
        name = ship(service, 2, files("b", json.dumps(file).encode()))
        await service.generate("a", adapter_id=name, max_new_tokens=1)


async def test_texts_that_are_too_long_for_any_prompt_are_not_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as service:
        forms = service.client.app[SERVICE].forms
        limit = 16 * max_total_tokens(service.engine.info)
        name = ship(service, 1, files("a", extended(NEW)))
        await service.generate("a", adapter_id=name, max_new_tokens=1)
        (form,) = forms._forms.values()
        monkeypatch.setattr(form.tokenizer, "_encode", None)  # whoever asks for it fails
        text = "a" * (limit + 1)
        asked: dict[str, dict[str, Any]] = {
            "prompt": {"model": name, "prompt": text},
            "messages": {"model": name, "messages": [{"role": "user", "content": text}]},
            "inputs": {"inputs": text, "parameters": {"adapter_id": name}},
        }
        paths = ("/v1/completions", "/v1/chat/completions", "/generate")
        for path, (field, body) in zip(paths, asked.items(), strict=True):
            refused = str(await service.json(path, body, status=422))
            assert f"`{field}` must have at most {limit} characters" in refused


async def test_files_that_changed_are_not_used() -> None:
    async with serving() as service:
        name = ship(service, 1, files("a", extended(NEW)))
        await service.generate("a", adapter_id=name, max_new_tokens=1)
        forms = service.client.app[SERVICE].forms
        forms._forms.clear()
        service.shard.tokenizers[name] = files("b", extended(NEW))
        body = {"inputs": "a", "parameters": {"adapter_id": name, "max_new_tokens": 1}}
        refused = await service.json("/generate", body, status=422)
        assert "changed after the adapter was loaded" in refused["error"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{% set x = messages[0].content * 99999999 %}{{ x * 999 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 10 ** (10 ** 9) }}",
    ],
)
async def test_a_hostile_template_harms_nobody(template: str) -> None:
    config = FakeConfig(echo=True)
    async with serving(config) as service:
        forms = service.client.app[SERVICE].forms
        forms._renderer._seconds = 1.0
        name = ship(service, 1, files("a", chat_template=template))
        hostile = asyncio.create_task(
            service.json("/v1/chat/completions", CHAT | {"model": name}, status=422)
        )
        await service.json("/v1/chat/completions", CHAT | {"model": "fake"})
        refused = await hostile
        assert "template" in refused["error"]["message"]
        good = ship(service, 2, files("b", chat_template="ok {{ messages[0].content }}"))
        answer = await service.json("/v1/chat/completions", CHAT | {"model": good})
        assert answer["choices"][0]["message"]["content"] == "ok "


async def test_a_file_that_takes_much_memory_is_refused() -> None:
    async with serving() as service:
        bomb = b'{"x":[' + b"[]," * 120_000 + b"[]]}"
        name = ship(service, 1, files("a", bomb))
        body = {"inputs": "a", "parameters": {"adapter_id": name, "max_new_tokens": 1}}
        refused = await service.json("/generate", body, status=422)
        assert "lists and objects" in refused["error"]


async def test_a_template_that_took_too_long_keeps_nobody_waiting_again() -> None:
    async with serving(FakeConfig(echo=True)) as service:
        renderer = service.client.app[SERVICE].forms._renderer
        renderer._seconds = 1.0
        endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        name = ship(service, 1, files("a", chat_template=endless))
        long = CHAT | {"messages": [{"role": "user", "content": "a" * 2**17}]}
        said = [
            (await service.json("/v1/chat/completions", body | {"model": name}, status=422))
            for body in (long, CHAT, CHAT, long)
        ]
    messages = [answer["error"]["message"] for answer in said]
    assert all("takes more than 1 s" in message for message in messages[:2])
    assert all("a short time ago" in message for message in messages[2:])


async def test_a_template_sees_nothing_of_the_services_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAFLEET_ADMIN_API_KEY", "top secret")
    async with serving() as service:
        forms = service.client.app[SERVICE].forms
        await forms._renderer.render({"chat_template": "x"}, [])
        [process] = forms._renderer._idle
        read = Path(f"/proc/{process.pid}/environ").read_bytes
        environment = await asyncio.to_thread(read)
        assert b"top secret" not in environment


async def test_a_deadline_covers_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(key: AdapterKey) -> AdapterTokenizer:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving() as service:
        name = ship(service, 1, files("a", extended(NEW)))
        monkeypatch.setattr(service.client.app[SERVICE].forms, "_fetch", never)
        parameters = {"adapter_id": name, "max_new_tokens": 1, "timeout": 0.2}
        body = {"inputs": "a", "parameters": parameters}
        refused = await service.json("/generate", body, status=504)
        assert refused["error_type"] == "timeout"
        assert not any(adapter.is_pinned for adapter in service.engine._directory)


async def test_the_bases_tokenizer_saved_anew_is_the_bases() -> None:
    file = json.loads(fake_tokenizer.tokenizer_json())
    saved = json.dumps(file | {"truncation": None, "padding": None}, indent=4).encode()
    assert saved != fake_tokenizer.tokenizer_json()
    async with serving() as service:
        forms = service.client.app[SERVICE].forms
        for number, shipped in enumerate((saved, fake_tokenizer.tokenizer_json())):
            name = ship(service, number, files(str(number), shipped))
            await service.generate("a", adapter_id=name, max_new_tokens=1)
        assert [form.tokenizer for form in forms._forms.values()] == [forms.base.tokenizer] * 2


async def test_a_tokenizer_that_takes_too_long_to_read_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: asyncio.Queue[Process] = asyncio.Queue()
    begin = child_process.start

    async def start(module: str) -> Process:
        process = await begin(module)
        started.put_nowait(process)
        return process

    monkeypatch.setattr(child_process, "start", start)
    reader = TokenizerReader(b"{}", 1)
    monkeypatch.setattr(tokenizer_reader, "_SECONDS", 0.0)
    with pytest.raises(AdapterUnservable, match="takes more than 0 s"):
        await reader.is_bases(extended(NEW))
    assert (await started.get()).returncode == -9
    monkeypatch.setattr(tokenizer_reader, "_SECONDS", 60.0)
    waiting = asyncio.create_task(reader.is_bases(extended(NEW)))
    process = await started.get()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert process.returncode == -9
    assert not await reader.is_bases(extended(NEW))  # its place is free again


async def test_a_reader_that_dies_refuses_the_tokenizer() -> None:
    with pytest.raises(AdapterUnservable, match="too much memory or time"):
        await TokenizerReader(b"no JSON", 1).is_bases(extended(NEW))
