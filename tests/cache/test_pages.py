"""PageLedger and PageLease."""

from __future__ import annotations

import pytest

from lorafleet.cache.pages import PageLedger


def test_close_returns_every_page_once() -> None:
    ledger = PageLedger(4)
    lease = ledger.lease()
    assert sorted(lease.grow(3)) == sorted(lease.pages)
    assert (ledger.num_free, ledger.num_used) == (1, 3)
    ledger.check([lease])
    lease.close()
    lease.close()
    assert (ledger.num_free, ledger.num_used) == (4, 0)
    ledger.check()


def test_kept_pages_turn_idle_and_are_shared_again() -> None:
    ledger = PageLedger(3)
    first, second = ledger.lease(), ledger.lease()
    pages = first.grow(2)
    for page in pages:
        ledger.keep(page)
    second.share(pages[:1])
    first.close()
    assert (ledger.num_free, ledger.num_idle, ledger.num_used) == (1, 1, 1)
    assert ledger.oldest_idle() == pages[1]
    second.share(pages[1:])
    assert ledger.oldest_idle() is None
    ledger.check([second])
    second.close()
    assert ledger.num_idle == 2


def test_the_end_of_an_idle_prefix_is_evicted_before_its_beginning() -> None:
    ledger = PageLedger(2)
    lease = ledger.lease()
    pages = lease.grow(2)
    for page in pages:
        ledger.keep(page)
    lease.close()
    assert ledger.oldest_idle() == pages[1]
    ledger.forget(pages[1])
    assert ledger.oldest_idle() == pages[0]
    ledger.check()


def test_forgetting_a_used_page_leaves_it_to_its_user() -> None:
    ledger = PageLedger(1)
    lease = ledger.lease()
    (page,) = lease.grow(1)
    ledger.keep(page)
    ledger.forget(page)
    assert ledger.num_used == 1
    lease.close()
    assert ledger.num_free == 1


def test_growing_without_room_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="without room"):
        PageLedger(1).lease().grow(2)


def test_check_finds_a_lost_page() -> None:
    ledger = PageLedger(2)
    ledger.lease().grow(1)
    with pytest.raises(AssertionError, match="held by no lease"):
        ledger.check()
