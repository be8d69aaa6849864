"""Shares: whose turn it is between adapters, by deficit round robin on tokens.

Time is cut into rounds. In each, an adapter's queue may take a quantum of tokens, and whoever is in
the earliest round goes first. What a sequence will take is not known when it starts, so a queue
may overdraw its quantum: it then sits out rounds until the others have caught up. This is deficit
round robin (Shreedhar and Varghese, 1995) with the cost charged as it arises, as Sheng et al.
(2024, "Fairness in Serving Large Language Models", appendix) adapt it to generation.
"""

from __future__ import annotations

from lorafleet.router.adapter import Adapter

QUANTUM_TOKENS = 1024


class Shares:
    """Tokens computed for each adapter, the base model (None) like any other.

    Between two queues that both have sequences ready to start at one priority, the tokens computed
    differ by at most a quantum and what the sequences running at once can take. Debts last while
    anybody waits; a share that is not used is not saved up.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._round = 0  # of whoever could start last; nobody is behind it
        self._spent: dict[Adapter | None, int] = {}  # tokens since round 0; absent = no debt

    def round_of(self, adapter: Adapter | None) -> int:
        """The round the adapter's queue has its next turn in."""
        spent = self._spent.get(adapter)
        return self._round if spent is None else max(self._round, spent // self._quantum)

    def charge(self, adapter: Adapter | None, num_tokens: int) -> None:
        """Tokens were computed for an adapter."""
        start = self._round * self._quantum
        self._spent[adapter] = max(start, self._spent.get(adapter, 0)) + num_tokens

    def reach(self, adapter: Adapter | None) -> None:
        """It is this adapter's turn: whoever is behind has not used its earlier ones."""
        reached = self.round_of(adapter)
        if reached > self._round:
            self._round = reached
            start = reached * self._quantum
            self._spent = {owner: spent for owner, spent in self._spent.items() if spent > start}

    def forgive(self) -> None:
        """Nobody waits, so nobody was wronged by what others took."""
        self._spent.clear()
