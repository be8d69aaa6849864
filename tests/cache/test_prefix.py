"""PrefixIndex."""

from __future__ import annotations

from lorafleet.cache.pages import PageLease, PageLedger
from lorafleet.cache.prefix import PrefixIndex, PrefixNode

SPACE = ("digest", "")


def add(
    index: PrefixIndex, ledger: PageLedger, tokens: list[int], space: tuple[str, str] = SPACE
) -> tuple[PageLease, PrefixNode | None]:
    """A lease over the full two-token pages of `tokens`, all indexed where possible."""
    node, shared = index.match(space, [*tokens, 0])
    lease = ledger.lease()
    lease.share(shared)
    last: PrefixNode | None = node
    for start in range(2 * len(shared), len(tokens), 2):
        (page,) = lease.grow(1)
        if last is not None:
            last = index.extend(last, tuple(tokens[start : start + 2]), page)
    return lease, last


def test_a_match_is_the_longest_common_prefix_and_leaves_a_token() -> None:
    ledger = PageLedger(8)
    index = PrefixIndex(ledger, 2)
    lease, _ = add(index, ledger, [1, 2, 3, 4])
    assert index.match(SPACE, [1, 2, 3, 4])[1] == lease.pages[:1]
    assert index.match(SPACE, [1, 2, 3, 4, 5])[1] == lease.pages
    assert index.match(SPACE, [1, 2, 9, 4, 5])[1] == lease.pages[:1]
    assert index.match(SPACE, [9, 2, 3, 4, 5])[1] == []
    index.check()


def test_namespaces_share_nothing() -> None:
    ledger = PageLedger(8)
    index = PrefixIndex(ledger, 2)
    add(index, ledger, [1, 2])
    assert index.match(("digest", "salt"), [1, 2, 3])[1] == []
    assert index.match(("", ""), [1, 2, 3])[1] == []


def test_equal_pages_computed_twice_are_indexed_once() -> None:
    ledger = PageLedger(8)
    index = PrefixIndex(ledger, 2)
    root, _ = index.match(SPACE, [1, 2, 3])
    lease, twin = ledger.lease(), ledger.lease()
    node = index.extend(root, (1, 2), lease.grow(1)[0])
    assert index.extend(root, (1, 2), twin.grow(1)[0]) is node
    twin.close()
    lease.close()
    assert (ledger.num_idle, ledger.num_free) == (1, 7)
    index.check()


def test_room_is_made_from_the_pages_idle_for_longest() -> None:
    ledger = PageLedger(4)
    index = PrefixIndex(ledger, 2)
    old, _ = add(index, ledger, [1, 2])
    new, _ = add(index, ledger, [3, 4])
    old.close()
    new.close()
    assert index.make_room(3)
    assert index.match(SPACE, [1, 2, 0])[1] == []
    assert len(index.match(SPACE, [3, 4, 0])[1]) == 1
    assert index.num_evictions == 1
    index.check()
    ledger.check()


def test_used_pages_are_never_evicted() -> None:
    ledger = PageLedger(2)
    index = PrefixIndex(ledger, 2)
    lease, _ = add(index, ledger, [1, 2])
    assert not index.make_room(2)
    ledger.check([lease])


def test_evicting_a_page_unindexes_what_follows_it() -> None:
    ledger = PageLedger(4)
    index = PrefixIndex(ledger, 2)
    root, _ = index.match(SPACE, [1, 2, 3, 4, 5])
    first, second = ledger.lease(), ledger.lease()
    node = index.extend(root, (1, 2), first.grow(1)[0])
    second.grow(1)  # its own copy of the first page, which stays unindexed
    assert node is not None
    child = index.extend(node, (3, 4), second.grow(1)[0])
    first.close()  # the parent is idle while its child is in use
    assert index.make_room(2)
    assert child is not None
    assert index.extend(child, (5, 6), second.pages[1]) is None
    index.check()
    ledger.check([second])
    second.close()
    assert ledger.num_free == 4


def test_forget_drops_a_whole_prefix() -> None:
    ledger = PageLedger(4)
    index = PrefixIndex(ledger, 2)
    lease, node = add(index, ledger, [1, 2, 3, 4])
    add(index, ledger, [1, 2, 5, 6])
    assert node is not None
    index.forget(node)
    assert index.match(SPACE, [1, 2, 0])[1] == []
    index.check()
    lease.close()
    assert ledger.num_idle == 0
