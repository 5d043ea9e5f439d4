"""The sequences that wait for pages: by age, and by turn."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice
from operator import attrgetter

from worker.sequence import Sequence

AGE, TURN = attrgetter("order"), attrgetter("turn", "order")


class WaitingQueue:
    """Iterates oldest first. A sequence's age and turn do not change while it waits."""

    def __init__(self) -> None:
        self._by_age: list[Sequence] = []
        self._by_turn: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._by_age)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_age)

    @property
    def oldest(self) -> Sequence | None:
        return self._by_age[0] if self._by_age else None

    def next_in_turn(self, count: int) -> list[Sequence]:
        """The first `count` at most."""
        return list(islice(self._by_turn, count))

    def add(self, sequence: Sequence) -> None:
        insort(self._by_age, sequence, key=AGE)
        insort(self._by_turn, sequence, key=TURN)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits."""
        del self._by_age[bisect_left(self._by_age, AGE(sequence), key=AGE)]
        del self._by_turn[bisect_left(self._by_turn, TURN(sequence), key=TURN)]
