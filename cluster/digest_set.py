"""A set of 64-bit digests in about 9 bytes each: the scheduler knows one of every full page in the cluster.

A Python set takes 60 to 100 bytes a digest and moves millions at once when it grows. Here sorted arrays of some hundred
digests each are *linear hashing* with the first bits of a digest as its hash: whenever the average passes
BUCKET_DIGESTS, the next bucket in turn is cut in two, and joined again when the set shrinks. No operation touches more
than two buckets. Digests that somebody made alike share a bucket, which then costs a longer memmove and nothing else.
An open-addressed table was refused: 11 to 20 bytes a digest, and every probe is a turn of Python's loop, while a bucket
is searched by `bisect`.

    level 2, 1 cut:   | 000.. | 001.. |   01..   |   10..   |   11..   |
                        cut     cut     ^ the next one
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Set
from itertools import chain
from sys import getsizeof

BUCKET_DIGESTS = 128  # 64 takes 1 byte more for each, 512 a tenth more time


class DigestSet(Set[int]):
    """A set of unsigned 64-bit ints; iterates in ascending order. Equal to any set of the same members.

    Time: O(log size) and a memmove of a few hundred bytes for each of `in`, `add` and `discard`.
    """

    __slots__ = ("_buckets", "_num_cut", "_shift", "_size")

    def __init__(self, digests: Iterable[int] = ()) -> None:
        self._buckets = [array("Q")]
        self._shift = 64  # what is left of a digest after it is its bucket's number at this level
        self._num_cut = 0  # buckets of this level that are two already
        self._size = 0
        self.update(digests)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self._buckets)

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, int) or digest >> 64:
            return False
        bucket = self._bucket(digest)
        at = bisect_left(bucket, digest)
        return at < len(bucket) and bucket[at] == digest

    def add(self, digest: int) -> bool:
        """True where it was not there yet. Raises OverflowError where it is no unsigned 64-bit int."""
        if digest >> 64:
            raise OverflowError(f"digest: got {digest}, must be an unsigned 64-bit int")
        bucket = self._bucket(digest)
        at = bisect_left(bucket, digest)
        if at < len(bucket) and bucket[at] == digest:
            return False
        bucket.insert(at, digest)
        self._size += 1
        if self._size > BUCKET_DIGESTS * len(self._buckets):
            self._cut()
        return True

    def discard(self, digest: int) -> bool:
        """True where it was there."""
        if digest >> 64:
            return False
        bucket = self._bucket(digest)
        at = bisect_left(bucket, digest)
        if at == len(bucket) or bucket[at] != digest:
            return False
        del bucket[at]
        self._size -= 1
        if 4 * self._size < BUCKET_DIGESTS * len(self._buckets) and len(self._buckets) > 1:
            self._join()
        return True

    def update(self, digests: Iterable[int]) -> None:
        """Add all of them."""
        for digest in digests:
            self.add(digest)

    def difference_update(self, digests: Iterable[int]) -> None:
        """Discard all of them."""
        for digest in digests:
            self.discard(digest)

    def num_bytes(self) -> int:
        """Memory that it takes, but for what malloc adds."""
        return getsizeof(self) + getsizeof(self._buckets) + sum(map(getsizeof, self._buckets))

    def _bucket(self, digest: int) -> array[int]:
        number = digest >> self._shift
        return self._buckets[digest >> (self._shift - 1) if number < self._num_cut else number + self._num_cut]

    def _cut(self) -> None:
        """The next bucket of this level becomes two."""
        at = 2 * self._num_cut
        bucket = self._buckets[at]
        middle = bisect_left(bucket, (at + 1) << (self._shift - 1))
        self._buckets[at : at + 1] = [bucket[:middle], bucket[middle:]]
        self._num_cut += 1
        if self._num_cut == 1 << (64 - self._shift):
            self._shift, self._num_cut = self._shift - 1, 0

    def _join(self) -> None:
        """The two that were cut last become one."""
        if not self._num_cut:
            self._shift += 1
            self._num_cut = 1 << (64 - self._shift)
        self._num_cut -= 1
        at = 2 * self._num_cut
        self._buckets[at : at + 2] = [self._buckets[at] + self._buckets[at + 1]]
