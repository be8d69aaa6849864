"""PrefixIndex: which full KV pages hold which token prefix.

A tree: a node is one full page of tokens after its parent's tokens, and a root is a namespace
within which equal tokens mean equal KV. Children are found by their whole token tuple, so two
prefixes are the same only when every token is: no hash is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafleet.cache.pages import PageLedger

Namespace = tuple[str, str]  # (adapter digest or "", cache salt)


class PrefixNode:
    """One cached page, or a namespace's root."""

    __slots__ = ("children", "is_live", "key", "page", "parent")

    def __init__(
        self, parent: PrefixNode | None, key: tuple[int, ...] | Namespace, page: int
    ) -> None:
        self.parent = parent  # None = a root
        self.key = key  # this page's tokens; a root's namespace
        self.page = page  # -1 for a root
        self.children: dict[tuple[int, ...], PrefixNode] = {}
        self.is_live = True  # still reachable from the index


class PrefixIndex:
    """Keeps pages in `ledger` and evicts the ones idle for longest."""

    def __init__(self, ledger: PageLedger, page_size: int) -> None:
        self.num_evictions = 0
        self._ledger = ledger
        self._page_size = page_size
        self._roots: dict[Namespace, PrefixNode] = {}  # only roots with children
        self._nodes: dict[int, PrefixNode] = {}  # by page

    def match(self, namespace: Namespace, tokens: Sequence[int]) -> tuple[PrefixNode, list[int]]:
        """The longest cached prefix of `tokens`: its last node, and its pages.

        At least one token is left to compute, because its output is what the caller is after.
        """
        node = self._roots.get(namespace) or PrefixNode(None, namespace, -1)
        pages: list[int] = []
        size = self._page_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            node = child
            pages.append(child.page)
        return node, pages

    def extend(self, node: PrefixNode, tokens: tuple[int, ...], page: int) -> PrefixNode | None:
        """Indexes a used page that holds `tokens` after `node`'s prefix; returns its node.

        If those tokens are already indexed the older page stays and this one remains private. None
        if `node` was evicted: its prefix is gone, so nothing can follow it.
        """
        if node.parent is None:
            node = self._roots.setdefault(node.key, node)  # type: ignore[arg-type]
        elif not node.is_live:
            return None
        child = node.children.get(tokens)
        if child is None:
            child = node.children[tokens] = self._nodes[page] = PrefixNode(node, tokens, page)
            self._ledger.keep(page)
        return child

    def make_room(self, count: int) -> bool:
        """Evicts idle pages until `count` are free; whether that succeeded."""
        while self._ledger.num_free < count:
            page = self._ledger.oldest_idle()
            if page is None:
                return False
            self._detach(self._nodes[page])
        return True

    def forget(self, node: PrefixNode) -> None:
        """Drops a node's whole prefix, and what follows it, because its content is in doubt."""
        while node.parent is not None and node.parent.parent is not None:
            node = node.parent
        if node.parent is not None and node.is_live:
            self._detach(node)

    def check(self) -> None:
        """Asserts that the tree and the ledger agree."""
        reached: set[int] = set()
        stack = list(self._roots.values())
        assert all(root.children for root in stack), "a namespace is empty"
        while stack:
            for child in stack.pop().children.values():
                assert self._nodes[child.page] is child
                assert child.is_live
                reached.add(child.page)
                stack.append(child)
        assert reached == set(self._nodes) == self._ledger._kept, "kept pages and nodes differ"

    def _detach(self, top: PrefixNode) -> None:
        """Removes a subtree. Pages in use below an idle one stay with their users, unindexed."""
        parent = top.parent
        assert parent is not None
        del parent.children[top.key]  # type: ignore[arg-type]
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]  # type: ignore[arg-type]
        stack = [top]
        while stack:
            node = stack.pop()
            node.is_live = False
            del self._nodes[node.page]
            self._ledger.forget(node.page)
            self.num_evictions += 1
            stack += node.children.values()
