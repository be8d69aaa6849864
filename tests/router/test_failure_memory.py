"""FailureMemory with a clock of the test's own."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest

from lorafleet.proto.messages import AdapterKey
from lorafleet.router import failure_memory
from lorafleet.router.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterNotFound,
    AdapterUnservable,
    Overloaded,
    RequestError,
    ShardLost,
    SourceTimeout,
    SourceUnavailable,
)
from lorafleet.router.failure_memory import FailureMemory

KEY = AdapterKey("hub", "owner/adapter")


class Body:
    """What a request holds while it is answered."""


def test_nothing_of_the_request_is_kept() -> None:
    memory = FailureMemory()

    def ask() -> weakref.ref[Body]:
        body = Body()
        with suppress(AdapterNotFound), memory.watch(KEY, "token"):
            raise AdapterNotFound("No such adapter.")
        return weakref.ref(body)

    asked = ask()
    gc.collect()
    assert len(memory) == 1
    assert asked() is None


class World:
    """A memory, its clock, and a fetch that fails."""

    def __init__(self, max_seconds: float = 60.0) -> None:
        self.now = 1000.0
        self.memory = FailureMemory(max_seconds, lambda: self.now)

    def fail(
        self, key: AdapterKey = KEY, token: str = "", error: RequestError | None = None
    ) -> None:
        error = error or SourceUnavailable("The hub is down.")
        with pytest.raises(type(error)), self.memory.watch(key, token):
            raise error

    def remembers(self, key: AdapterKey = KEY, token: str = "") -> bool:
        try:
            self.memory.check(key, token)
        except AdapterError:
            return True
        return False

    def seconds(self) -> float:
        """How long the failure is remembered from now, in whole seconds; moves the clock there."""
        start = self.now
        while self.remembers():
            self.now += 1.0
        return self.now - start


def test_the_time_doubles_up_to_the_longest_and_starts_over_after_a_pause() -> None:
    world = World()
    seconds = []
    for _ in range(8):
        world.fail()
        seconds.append(world.seconds())
    assert seconds == [1, 2, 4, 8, 16, 32, 60, 60]
    world.now += 59
    world.fail()
    assert world.seconds() == 60
    world.now += 61
    world.fail()
    assert world.seconds() == 1


def test_a_success_starts_over() -> None:
    world = World()
    for _ in range(3):
        world.fail()
    world.memory.succeeded(KEY, "")
    assert not world.remembers()
    assert len(world.memory) == 0
    world.fail()
    assert world.seconds() == 1


@pytest.mark.parametrize(
    "kind", [AdapterNotFound, AdapterForbidden, AdapterUnservable, SourceUnavailable, SourceTimeout]
)
def test_the_error_is_the_same_and_says_that_it_is_remembered(kind: type[AdapterError]) -> None:
    world = World()
    for _ in range(4):
        world.fail(error=kind("The sentence."))
    world.now += 2.5
    with pytest.raises(kind) as caught:
        world.memory.check(KEY, "")
    assert str(caught.value) == (
        "The sentence. (Remembered: this was found 2 s ago; it is tried again in 6 s.)"
    )
    is_passing = issubclass(kind, SourceUnavailable | SourceTimeout)
    assert caught.value.retry_after_seconds == (6 if is_passing else 0)


def test_a_first_failure_of_a_source_says_when_to_come_again() -> None:
    error = SourceTimeout("too slow")
    World().fail(error=error)
    assert error.retry_after_seconds == 1


@pytest.mark.parametrize("error", [Overloaded("full"), ShardLost("gone"), AdapterError("what?")])
def test_what_says_nothing_of_the_adapter_is_not_remembered(error: RequestError) -> None:
    world = World()
    world.fail(error=error)
    assert not world.remembers()


def test_callers_and_revisions_are_apart() -> None:
    world = World()
    world.fail(token="one")
    assert world.remembers(token="one")
    for key, token in [
        (KEY, ""),
        (KEY, "two"),
        (AdapterKey("hub", KEY.id, "v2"), "one"),
        (AdapterKey("s3", KEY.id), "one"),
    ]:
        assert not world.remembers(key, token)


def test_local_adapters_are_always_tried() -> None:
    world = World()
    world.fail(AdapterKey("local", "broken"))
    assert not world.remembers(AdapterKey("local", "broken"))


def test_zero_seconds_remember_nothing() -> None:
    world = World(0)
    world.fail()
    assert not world.remembers()
    assert len(world.memory) == 0


def test_an_adapter_can_be_forgotten_for_everyone() -> None:
    world = World()
    other = AdapterKey("hub", "owner/other")
    for key, token in [(KEY, ""), (KEY, "one"), (other, "")]:
        world.fail(key, token)
    world.memory.forget(KEY)
    assert [world.remembers(*caller) for caller in [(KEY, ""), (KEY, "one"), (other, "")]] == [
        False,
        False,
        True,
    ]


def test_bad_names_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_memory, "_MAX_FAILURES", 100)
    world = World()
    for number in range(250):
        world.fail(AdapterKey("hub", f"no/{number}"))
    assert len(world.memory) == 100
    assert world.remembers(AdapterKey("hub", "no/249"))
    assert not world.remembers(AdapterKey("hub", "no/149"))


def test_tokens_are_not_kept() -> None:
    world = World()
    world.fail(token="hf_secret")
    assert "hf_secret" not in repr(vars(world.memory))
