"""Prompts equal those transformers renders from the same template."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorafleet.router.chat import ChatTemplate, TemplateFailed, read_messages
from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields
from tests.router.tokenizers_for_tests import byte_level

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
LLAMA_LIKE = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}
{%- endif %}
{%- for m in messages %}
  {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('which role') }}{% endif %}
  {%- if m.content == 'skip' %}{% continue %}{% endif %}
  {%- if loop.first and system %}{{ '<<SYS>>' ~ system ~ '<</SYS>>' }}{% endif %}
  {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
  {%- else %}[{{ m.content }}]{% endif %}
{%- endfor %}
"""
TOJSON = """{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}
{{ {'text': m.content, 'extra': m.name | default('-')} | tojson(indent=2) }} <é>
{{ m | tojson }}
{%- endfor %} {{ ns.n }} {{ tools is none }} {{ documents is none }} {{ pad_token is defined }}"""
REASONING = """{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}
{{ m.content }}{% endfor %}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": "be <brief> & 'kind'"},
        {"role": "user", "content": "  größe 🎉\n\n", "name": "é"},
        {"role": "assistant", "content": "x", "reasoning": "because"},
        {"role": "user", "content": "skip"},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE, TOJSON, REASONING])
def test_renders_as_transformers_does(template: str, chat: list[dict[str, Any]]) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = template
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    config = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    assert ChatTemplate(config).render(read_messages(Fields({"messages": chat}))) == expected


def test_the_default_of_several_templates() -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert ChatTemplate({"chat_template": named}).render([]) == "D"


def test_no_template_is_said() -> None:
    with pytest.raises(TemplateFailed, match="no chat template"):
        ChatTemplate({}).render([])


def test_a_broken_template_is_said() -> None:
    with pytest.raises(TemplateFailed, match="does not compile"):
        ChatTemplate({"chat_template": "{% for %}"}).render([])


def test_the_templates_own_refusal_is_passed_on() -> None:
    template = ChatTemplate({"chat_template": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "attack",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}"],
)
def test_the_sandbox_holds(attack: str) -> None:
    with pytest.raises(TemplateFailed):
        ChatTemplate({"chat_template": attack}).render([{"role": "user", "content": "x"}])


def test_text_parts_become_one_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    [message] = read_messages(Fields({"messages": [{"role": "user", "content": parts}]}))
    assert message["content"] == "a b"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "type text",
        ),
        ({"role": "user", "content": 3}, "a string or a list of parts, got 3"),
        ({"content": "x"}, r"messages\[0\].role` is required"),
        ({"role": 1, "content": "x"}, r"messages\[0\].role` must be a string"),
        ("hello", r"messages\[0\]` must be an object"),
        ({"role": "user", "content": "\ud800"}, "surrogate"),
    ],
)
def test_bad_messages_are_named(message: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        read_messages(Fields({"messages": [message]}))


@pytest.mark.parametrize("messages", [None, [], "hello"])
def test_messages_must_be_there(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="`messages`"):
        read_messages(Fields({"messages": messages}))
