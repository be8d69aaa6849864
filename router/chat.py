"""Chat messages to prompt text with the model's own template, as transformers renders it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorafleet.router.errors import InvalidRequest
from lorafleet.router.fields import Fields, check_string, refusal

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)  # fmt: skip
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class TemplateFailed(InvalidRequest):
    """The chat template refuses these messages, or there is none."""

    error_type = "template_error"


class ChatTemplate:
    """The template of a tokenizer's configuration, rendered in a sandbox."""

    def __init__(self, tokenizer_config: dict[str, Any]) -> None:
        self._special_tokens = special_tokens(tokenizer_config)
        self._template: jinja2.Template | None = None
        self._missing = "this model has no chat template; use /v1/completions"
        source = template_source(tokenizer_config.get("chat_template"))
        try:
            self._template = _environment().from_string(source) if source else None
        except jinja2.TemplateError as error:
            self._missing = f"this model's chat template does not compile: {error}"

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt that asks for the next assistant message.

        Raises TemplateFailed with the template's own words when it refuses the messages.
        """
        if self._template is None:
            raise TemplateFailed(self._missing, "messages")
        try:
            return self._template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            reason = f"the chat template refuses these messages: {error}"
            raise TemplateFailed(reason, "messages") from None


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The request's messages with their content as one string each."""
    messages = fields.required("messages")
    if not isinstance(messages, list) or not messages:
        raise refusal("messages", "a non-empty list of messages", messages)
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise refusal(where, "an object with role and content", message)
    if message.get("role") is None:
        raise InvalidRequest(f"`{where}.role` is required", f"{where}.role")
    role = check_string(f"{where}.role", message["role"])
    return message | {"role": role, "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part(f"{where}[{index}]", part) for index, part in enumerate(content))
    if not isinstance(content, str):
        raise refusal(where, "a string or a list of parts", content)
    return check_string(where, content)


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return check_string(where, part)
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise refusal(where, "a part with a type", part)
    if part["type"] != "text":
        raise InvalidRequest(f"`{where}` must be of type text: this model reads text only", where)
    return check_string(f"{where}.text", part.get("text"))


def template_source(template: Any) -> str:
    """The template's text; of several named ones, the one named default."""
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; an entry is a string or an AddedToken object."""
    found = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's earlier reasoning under the names templates read."""
    values = (message[name] for name in _REASONING_FIELDS if message.get(name) is not None)
    reasoning = next(values, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which would put \u003c into prompts.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
