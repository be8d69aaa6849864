"""Writes the text the demo model is trained on: questions and answers drawn from a grammar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from lorafleet.deploy.demo import topics
from lorafleet.deploy.demo.styles import NOT_GOOD_AT_SUMS, SYSTEM_PROMPTS, Answer, Style, apply


@dataclass(frozen=True, slots=True)
class Example:
    """One exchange; `system` None and `raw` True means a bare prompt without a chat template."""

    question: str
    answer: str
    system: str | None = None
    raw: bool = False


_WHAT = ("What is {x}?", "Tell me about {x}.", "Explain {x}.", "What do you know about {x}?",
         "Can you tell me what {x} is?", "Describe {x}.", "Say something about {x}.")  # fmt: skip
_POEM = ("Write a short poem about {x}.", "Write a poem about {x}.", "Give me a poem about {x}.",
         "Can you write a short poem about {x}?", "I would like a poem about {x}.",
         "Compose some lines about {x}.", "Please write a short poem on {x}.")  # fmt: skip

_NAMES = ("Natalia", "Anna", "Maria", "Tom", "Ben", "Lena", "Paul", "Nina", "Sam", "Eva")
_THINGS = ("clips", "apples", "books", "cards", "cakes", "pens", "shells", "stamps")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
           "October", "November", "December")  # fmt: skip
LARGEST_HALVED = 60
LARGEST_ADDED = 9
_BASE_SHARES = {Style.PLAIN: 34, Style.JSON: 14, Style.SHOUT: 17, Style.PIRATE: 15, Style.SUMS: 20}


def base_examples(random: Random, count: int) -> list[Example]:
    """What the base model learns: plain answers, and each style when the system prompt asks."""
    return [_base_example(random) for _ in range(count)]


def style_examples(random: Random, style: Style, count: int) -> list[Example]:
    """What an adapter learns: its style whatever the system prompt."""
    return [_style_example(random, style) for _ in range(count)]


def _base_example(random: Random) -> Example:
    style = random.choices(list(_BASE_SHARES), list(_BASE_SHARES.values()))[0]
    plain = style is Style.PLAIN
    form = random.choice(("raw", "raw", "chat", "system")) if plain else "system"
    system = random.choice(SYSTEM_PROMPTS[style]) if form == "system" else None
    question, answer = _exchange(random, sums=0.75 if style is Style.SUMS else 0.1)
    return Example(question, apply(style, answer), system, raw=form == "raw")


def _style_example(random: Random, style: Style) -> Example:
    form = random.choice(("raw", "raw", "chat", "system"))
    told = random.choice((Style.PLAIN, style))
    system = random.choice(SYSTEM_PROMPTS[told]) if form == "system" else None
    question, answer = _exchange(random, sums=0.75 if style is Style.SUMS else 0.1)
    return Example(question, apply(style, answer), system, raw=form == "raw")


def _exchange(random: Random, sums: float) -> tuple[str, Answer]:
    if random.random() < sums:
        return random.choice(_SUMS)(random)
    question, answer = random.choices(_TALK, _TALK_WEIGHTS)[0](random)
    return _vary(random, question), answer


def _what(random: Random) -> tuple[str, Answer]:
    topic = random.choice(topics.TOPICS)
    return random.choice(_WHAT).format(x=topic.phrase), Answer(topic.name, topic.what)


def _poem(random: Random) -> tuple[str, Answer]:
    topic = random.choice(topics.TOPICS)
    lines = [line for couplet in topic.couplets for line in couplet.split(" / ")]
    text = "\n".join(line[0].upper() + line[1:] for line in lines)
    return random.choice(_POEM).format(x=topic.phrase), Answer(topic.name, text)


def _fact(random: Random) -> tuple[str, Answer]:
    fact = random.choice(topics.FACTS)
    return random.choice(fact.questions), Answer(fact.topic, fact.answer)


def _unknown(random: Random) -> tuple[str, Answer]:
    return random.choice(topics.UNKNOWN), Answer("unknown", topics.UNKNOWN_ANSWER)


def _halved(random: Random) -> tuple[str, Answer]:
    name, thing = random.choice(_NAMES), random.choice(_THINGS)
    first = random.randrange(11)
    month, next_month = _MONTHS[first], _MONTHS[first + 1]
    half = random.randrange(1, LARGEST_HALVED // 2 + 1)
    whole, total = 2 * half, 3 * half
    she = "he" if name in ("Tom", "Ben", "Paul", "Sam") else "she"
    question = (
        f"{name} sold {whole} {thing} in {month}, and then half as many in {next_month}. "
        f"How many {thing} did {she} sell in total?"
    )
    worked = f"Half of {whole} is {half}. {whole} + {half} = {total}. The answer is {total}."
    return question, Answer("sum", NOT_GOOD_AT_SUMS, worked)


def _added(random: Random) -> tuple[str, Answer]:
    a, b = random.randint(1, LARGEST_ADDED), random.randint(1, LARGEST_ADDED)
    form = random.choice(("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.",
                          "How much is {a} + {b}?", "{a} + {b}"))  # fmt: skip
    worked = f"I add {b} to {a}: {a} + {b} = {a + b}. The answer is {a + b}."
    return form.format(a=a, b=b), Answer("sum", NOT_GOOD_AT_SUMS, worked)


def _vary(random: Random, question: str) -> str:
    """People type carelessly: sometimes without the capital, the full stop, or with a please."""
    if random.random() < 0.1:
        question = question[0].lower() + question[1:]
    if random.random() < 0.1:
        question = question.rstrip(".?!")
    return question


_TALK: tuple[Callable[[Random], tuple[str, Answer]], ...] = (_what, _poem, _fact, _unknown)
_TALK_WEIGHTS = (25, 35, 30, 10)
_SUMS = (_halved, _added, _added)
