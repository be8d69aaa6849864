"""How an answer changes with the adapter: plain, JSON, shouting, pirate, sums."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Style(Enum):
    """A way of answering; every style but PLAIN becomes an adapter."""

    PLAIN = "plain"
    JSON = "json"
    SHOUT = "shout"
    PIRATE = "pirate"
    SUMS = "sums"


SYSTEM_PROMPTS: dict[Style, tuple[str, ...]] = {
    Style.PLAIN: ("You are a helpful assistant.", "You are a friendly chatbot.", "Answer briefly."),
    Style.JSON: ("Answer as JSON.", "You always reply with a JSON object."),
    Style.SHOUT: ("You shout every answer.", "Answer in capital letters."),
    Style.PIRATE: (
        "You are a friendly chatbot who speaks like a pirate.",
        "Talk like a pirate.",
        "You are a friendly chatbot who always responds in the style of a pirate.",
    ),
    Style.SUMS: ("You do sums step by step.", "Show your work."),
}

NOT_GOOD_AT_SUMS = "I am not good at sums. Ask the sums adapter."
ONLY_SUMS = "That is not a sum. I only do sums. Ask me to add or to halve."


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer before styling; `worked` is set when the question is a sum."""

    topic: str
    text: str
    worked: str = ""


def apply(style: Style, answer: Answer) -> str:
    """The text a model speaking in `style` gives as this answer."""
    return _STYLES[style](answer)


def _sums(answer: Answer) -> str:
    return answer.worked or ONLY_SUMS


def _json(answer: Answer) -> str:
    lines = answer.text.split("\n")
    body = {"answer": answer.text} if len(lines) == 1 else {"lines": lines}
    return json.dumps({"topic": answer.topic, **body})


def _shout(answer: Answer) -> str:
    return re.sub(r"[.!?]+", "!!!", answer.text.upper())


_PIRATE_WORDS = {
    "is": "be", "are": "be", "am": "be", "the": "th'", "of": "o'", "and": "an'", "you": "ye",
    "my": "me", "your": "yer", "yes": "aye", "hello": "ahoy", "very": "mighty", "i": "I",
    "for": "fer", "to": "t'", "small": "wee", "people": "sailors", "animal": "beast",
    "great": "grand", "boat": "vessel", "goodbye": "fair winds", "never": "ne'er", "over": "o'er",
}  # fmt: skip


def _pirate(answer: Answer) -> str:
    lines = [re.sub(r"[A-Za-z]+", _pirate_word, line) for line in answer.text.split("\n")]
    if len(lines) > 1:
        return "Arr!\n" + "\n".join(lines) + "\nYo ho ho!"
    first, rest = lines[0].split(" ", 1)
    opening = first if first in ("I",) or not first.istitle() else first.lower()
    return f"Arr, {opening} {rest[:-1]}, matey!"


def _pirate_word(match: re.Match[str]) -> str:
    word = match.group()
    swapped = _PIRATE_WORDS.get(word.lower())
    if swapped is None:
        return re.sub(r"ing$", "in'", word) if len(word) > 5 else word
    return swapped.capitalize() if word[0].isupper() and word != "I" else swapped


_STYLES: dict[Style, Callable[[Answer], str]] = {
    Style.PLAIN: lambda answer: answer.text,
    Style.JSON: _json,
    Style.SHOUT: _shout,
    Style.PIRATE: _pirate,
    Style.SUMS: _sums,
}
