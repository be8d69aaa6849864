"""ByteLedger."""

from __future__ import annotations

from lorafleet.cache.residency import ByteLedger


def test_bytes_follow_what_is_held() -> None:
    ledger = ByteLedger[str](100)
    ledger.put("a", 40)
    ledger.put("b", 30)
    ledger.put("a", 10)
    assert (ledger.used, len(ledger), ledger.nbytes("a")) == (40, 2, 10)
    ledger.remove("a")
    ledger.remove("a")
    assert (ledger.used, ledger.nbytes("a"), "a" in ledger) == (30, 0, False)
    ledger.check()


def test_the_oldest_is_the_least_recently_used_that_is_not_pinned() -> None:
    ledger = ByteLedger[str](100)
    for name in "abc":
        ledger.put(name, 1)
    ledger.touch("a")
    ledger.touch("unknown")
    assert ledger.oldest(lambda key: False) == "b"
    assert ledger.oldest(lambda key: key == "b") == "c"
    assert ledger.oldest(lambda key: True) is None


def test_what_is_kept_is_never_the_oldest_and_takes_room_from_the_others() -> None:
    ledger = ByteLedger[str](100)
    ledger.put("a", 30)
    ledger.put("b", 20)
    ledger.keep("a")
    ledger.keep("a")
    assert ledger.oldest(lambda key: False) == "b"
    assert ledger.room == 70
    ledger.put("a", 40)  # its content was replaced
    assert ledger.room == 60
    ledger.remove("a")
    assert ledger.room == 100
    ledger.put("a", 10)
    ledger.check()
    ledger.unkeep("a")
    ledger.unkeep("a")
    assert (ledger.oldest(lambda key: False), ledger.room) == ("b", 100)
    ledger.check()
