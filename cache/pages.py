"""PageLedger: who holds which KV page.

A page is free, used (it has users), or idle: kept for the prefix index with no user, ready to be
shared again or evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PageLedger:
    """Counts users of pages 0 .. num_pages - 1; hands out free ones through leases."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Kept pages without a user."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages with a user."""
        return self.num_pages - len(self._free) - len(self._idle)

    def lease(self) -> PageLease:
        """An empty lease on this ledger."""
        return PageLease(self)

    def keep(self, page: int) -> None:
        """From now on a used page turns idle, not free, when its last user leaves."""
        assert self._users[page] > 0
        assert page not in self._kept
        self._kept.add(page)

    def forget(self, page: int) -> None:
        """Undoes `keep`; an idle page becomes free."""
        self._kept.remove(page)
        if self._users[page] == 0:
            del self._idle[page]
            self._free.append(page)

    def oldest_idle(self) -> int | None:
        """The idle page unused for longest."""
        return next(iter(self._idle), None)

    def check(self, leases: Iterable[PageLease] = ()) -> None:
        """Asserts that every page is in one state and its users are exactly these leases."""
        users = [0] * self.num_pages
        for lease in leases:
            for page in lease.pages:
                users[page] += 1
        assert users == self._users, "pages are held by no lease, or freed under one"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        for page, count in enumerate(users):
            is_idle = count == 0 and page in self._kept
            assert (page in self._idle) == is_idle, f"page {page} is not where it should be"
            assert (page in free) == (count == 0 and not is_idle), f"page {page} is lost"

    def _take(self, count: int) -> list[int]:
        assert count <= len(self._free), "grow() without room"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def _share(self, page: int) -> None:
        assert page in self._kept
        if self._users[page] == 0:
            del self._idle[page]
        self._users[page] += 1

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            if page in self._kept:
                self._idle[page] = None
            else:
                self._free.append(page)


class PageLease:
    """The pages of one sequence, in position order."""

    __slots__ = ("_ledger", "pages")

    def __init__(self, ledger: PageLedger) -> None:
        self._ledger = ledger
        self.pages: list[int] = []

    def grow(self, count: int) -> list[int]:
        """Appends `count` free pages, which must be there; returns them."""
        pages = self._ledger._take(count)
        self.pages += pages
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Appends kept pages that others may be reading."""
        for page in pages:
            self._ledger._share(page)
            self.pages.append(page)

    def close(self) -> None:
        """Gives every page back; closing twice is harmless."""
        # Deepest first: of an idle prefix, the end is older and so evicted before its beginning.
        for page in reversed(self.pages):
            self._ledger._release(page)
        self.pages = []
