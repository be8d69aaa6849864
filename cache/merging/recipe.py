"""MergeRecipe: what a merged adapter is made of, and its one spelling, which is its id.

    linear(0.7*local:french,0.3*hub:owner/polite@v2)
    dare_ties[0.5,frequency](0.7*local:french,0.3*local:polite)

Ids and revisions are percent-encoded as in a URL, but for "/" and ":"; weights and density are
spelled as Python's `repr` does. A text that is spelled otherwise is no recipe, so equal recipes
have equal ids.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from hashlib import sha256
from math import isfinite
from urllib.parse import quote, unquote

from lorafleet.proto.messages import AdapterKey

SOURCE = "merged"  # of the key of a merged adapter

MIN_MEMBERS, MAX_MEMBERS = 2, 16
MAX_WEIGHT = 1000.0  # in magnitude
MAX_LENGTH = 2048  # characters of a recipe

_TEXT = re.compile(r"([a-z_]+)(?:\[([^],]+)(?:,([a-z]+))?\])?\((.+)\)")
_MEMBER = re.compile(r"([^*]+)\*([a-z0-9]+):([^@]+)(?:@(.+))?")


class Strategy(StrEnum):
    """How members are combined: peft's `combination_type`."""

    LINEAR = "linear"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"

    @property
    def prunes(self) -> bool:
        """Whether a density says how much of each member is kept."""
        return self is not Strategy.LINEAR

    @property
    def draws(self) -> bool:
        """Whether what is kept is drawn, and not the largest."""
        return self in (Strategy.DARE_LINEAR, Strategy.DARE_TIES)

    @property
    def elects(self) -> bool:
        """Whether each value's sign is elected, and members of another sign are left out."""
        return self in (Strategy.TIES, Strategy.DARE_TIES)


class MajoritySign(StrEnum):
    """What elects a sign: the members' sum, or their number."""

    TOTAL = "total"
    FREQUENCY = "frequency"


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter and its weight in the merge."""

    key: AdapterKey
    weight: float

    def __str__(self) -> str:
        revision = f"@{_quoted(self.key.revision)}" if self.key.revision else ""
        return f"{self.weight!r}*{self.key.source}:{_quoted(self.key.id)}{revision}"


@dataclass(frozen=True)
class MergeRecipe:
    """A merge. Density and sign method are 1 and TOTAL where the strategy takes none.

    Raises ValueError, with a sentence for the client, for what no merge can have.
    """

    members: tuple[Member, ...]
    strategy: Strategy = Strategy.LINEAR
    density: float = 1.0  # share of each member's values that is kept
    sign: MajoritySign = MajoritySign.TOTAL

    def __post_init__(self) -> None:
        if not MIN_MEMBERS <= len(self.members) <= MAX_MEMBERS:
            raise ValueError(
                f"between {MIN_MEMBERS} and {MAX_MEMBERS} adapters can be merged, "
                f"got {len(self.members)}"
            )
        if not 0 < self.density <= 1:
            raise ValueError(f"the density must be > 0 and <= 1, got {self.density}")
        for member in self.members:
            if not (isfinite(member.weight) and abs(member.weight) <= MAX_WEIGHT):
                raise ValueError(
                    f"weights must be between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g}, "
                    f"got {member.weight}"
                )
            if member.key.source == SOURCE:
                raise ValueError("a merged adapter cannot be merged again")
        if len(str(self)) > MAX_LENGTH:
            raise ValueError(
                f"the recipe of a merge must have at most {MAX_LENGTH} characters, all ids "
                f"included, got {len(str(self))}"
            )

    @classmethod
    def parse(cls, text: str) -> MergeRecipe:
        """The recipe of this spelling. Raises ValueError for any other text."""
        return _parse(text)

    @property
    def key(self) -> AdapterKey:
        """The merged adapter's key."""
        return AdapterKey(SOURCE, str(self))

    @property
    def seed(self) -> int:
        """What random pruning draws with: the same for the same recipe, wherever it is made."""
        return int.from_bytes(sha256(str(self).encode()).digest()[:8], "big") >> 1

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        options = [repr(self.density)] if self.strategy.prunes else []
        options += [self.sign] if self.strategy.elects else []
        head = f"{self.strategy}[{','.join(options)}]" if options else str(self.strategy)
        return f"{head}({','.join(map(str, self.members))})"


def members_of(key: AdapterKey) -> tuple[AdapterKey, ...]:
    """The adapters a merged one is made of, each once; none for any other adapter.

    Raises ValueError for a merged adapter whose id is no recipe.
    """
    if key.source != SOURCE:
        return ()
    return tuple(dict.fromkeys(member.key for member in MergeRecipe.parse(key.id).members))


@lru_cache(maxsize=1024)
def _parse(text: str) -> MergeRecipe:
    recipe = _read(text) if len(text) <= MAX_LENGTH else None
    if recipe is None or str(recipe) != text:
        raise ValueError(
            "the id of a merged adapter must be a recipe in its one spelling, such as "
            "linear(0.5*local:one,0.5*local:two)"
        )
    return recipe


def _read(text: str) -> MergeRecipe | None:
    found = _TEXT.fullmatch(text)
    if found is None or found[1] not in list(Strategy):
        return None
    try:
        density = float(found[2]) if found[2] else 1.0
        sign = MajoritySign(found[3]) if found[3] else MajoritySign.TOTAL
        members = tuple(_read_member(member) for member in found[4].split(","))
    except ValueError:
        return None
    return MergeRecipe(members, Strategy(found[1]), density, sign)


def _read_member(text: str) -> Member:
    found = _MEMBER.fullmatch(text)
    if found is None:
        raise ValueError(text)
    revision = unquote(found[4]) if found[4] else ""
    return Member(AdapterKey(found[2], unquote(found[3]), revision), float(found[1]))


def _quoted(text: str) -> str:
    return quote(text, safe="/:")
