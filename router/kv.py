"""KvPages: the pages sequences compute into, and the prefixes they share."""

from __future__ import annotations

from collections.abc import Iterable

from lorafleet.cache.pages import PageLedger
from lorafleet.cache.prefix import PrefixIndex
from lorafleet.router.sequence import Sequence


class KvPages:
    """The page ledger and the prefix index of one group, as scheduling uses them."""

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool) -> None:
        self.page_size = page_size
        self.pages = PageLedger(num_pages)
        self.prefix = PrefixIndex(self.pages, page_size)
        self.num_query_tokens = 0  # known tokens of admitted sequences that may share a prefix
        self.num_hit_tokens = 0  # of those, tokens whose pages were there
        self._prefix_caching = prefix_caching

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` positions."""
        return -(-num_tokens // self.page_size)

    def admit(self, sequence: Sequence, margin: int) -> bool:
        """Gives a sequence a lease over its known tokens, sharing what is cached.

        False, and nothing taken, unless that leaves `margin` pages that are free or idle.
        """
        pages = self.pages
        available = pages.num_free + pages.num_idle
        if available <= margin:
            return False
        node, shared = None, list[int]()
        if self._can_share(sequence):
            node, shared = self.prefix.match(sequence.namespace, sequence.tokens)
        lease = pages.lease()
        lease.share(shared)
        needed = self.pages_for(len(sequence.tokens)) - len(shared)
        if pages.num_free + pages.num_idle < needed + margin:
            lease.close()
            return False
        self.prefix.make_room(needed)
        lease.grow(needed)
        sequence.lease, sequence.node = lease, node
        sequence.num_indexed = len(shared)
        sequence.num_planned = len(shared) * self.page_size
        if node is not None:
            self.num_query_tokens += len(sequence.tokens)
            self.num_hit_tokens += sequence.num_planned
        return True

    def needs_page(self, sequence: Sequence) -> bool:
        """Whether its next position lies beyond its pages."""
        assert sequence.lease is not None
        return sequence.num_planned == len(sequence.lease.pages) * self.page_size

    def index(self, sequence: Sequence) -> None:
        """Indexes the sequence's full pages whose tokens are known and whose computation is sent.

        Sent is enough: the shard runs plans in order, so any plan that reads them comes after.
        """
        assert sequence.lease is not None
        size = self.page_size
        ready = min(sequence.num_planned, len(sequence.tokens)) // size
        while sequence.node is not None and sequence.num_indexed < ready:
            start = sequence.num_indexed * size
            tokens = tuple(sequence.tokens[start : start + size])
            page = sequence.lease.pages[sequence.num_indexed]
            sequence.node = self.prefix.extend(sequence.node, tokens, page)
            sequence.num_indexed += 1

    def release(self, sequence: Sequence) -> None:
        """Takes the sequence's pages back."""
        assert sequence.lease is not None
        sequence.lease.close()
        sequence.lease = sequence.node = None

    def distrust(self, sequence: Sequence) -> None:
        """Its computation went wrong: nobody shares any of its prefix from now on."""
        node, _ = self.prefix.match(sequence.namespace, sequence.tokens)
        self.prefix.forget(node)

    def check(self, running: Iterable[Sequence]) -> None:
        """Asserts that exactly these sequences hold pages."""
        leases = [sequence.lease for sequence in running]
        self.pages.check([lease for lease in leases if lease is not None])
        self.prefix.check()

    def _can_share(self, sequence: Sequence) -> bool:
        # A shared prefix is not computed, so it would have no prompt log-probabilities.
        return self._prefix_caching and not sequence.request.sampling.prompt_logprobs
