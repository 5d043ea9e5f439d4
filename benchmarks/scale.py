"""The global scheduler's own code at scale: what a page costs in memory, and what an event costs in CPU time.

    python -m benchmarks.scale [--json] [--sequences 1000,10000] [--repeats 200]

From the repository's root; no model, no sockets. The real GlobalScheduler hears what 64 shards of 16 devices would tell
it (made from a seed): sequences of 10 to 65,536 pages, log-uniform, that grow in turn until all are there, each full
page sealed. Then events of equal content are timed at the smaller and the larger size, in turns, in CPU time of the
thread: **ratio** is the larger size's median over the smaller's, and must be at most 1.5. Memory is the process's own
(RSS), beside what was predicted from 8.3 bytes an entry and 9.2 a digest; it must be at most 4 GiB. Last, what places
pages inside a shard is timed at the shard's share of the sequences.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.fleet import (
    BLOCK_SIZE,
    CHUNK,
    FEWEST_PAGES,
    MOST_PAGES,
    NUM_DEVICES,
    NUM_SHARDS,
    Fleet,
    Kinds,
    log_uniform,
)
from pagetable.allocator import NO_PLAN, BlockAllocator
from pagetable.block_table import BlockTable
from pagetable.ids import DeviceId, LogicalPageId
from pagetable.page import PagePool
from pagetable.prefix_tree import NO_PAGE

MOST_BYTES, MOST_RATIO = 4 << 30, 1.5
ENTRY_BYTES, DIGEST_BYTES = 8.3, 9.2  # arrays grow by a sixteenth; see cluster/digest_set.py
TURNS = 5


class Leader:
    """The pages of one shard, as its leader places them over the shard's devices; every full page is sealed.

    Args:
        num_sequences: with tables as long as a Fleet's.
    """

    def __init__(self, num_sequences: int, seed: int, num_devices: int = NUM_DEVICES) -> None:
        self.rng = random.Random(seed)
        lengths = [log_uniform(self.rng) for _ in range(num_sequences)]
        room = -(-sum(lengths) // num_devices) + 100 * CHUNK
        self.pool = PagePool([[BlockAllocator(DeviceId(device), room) for device in range(num_devices)]])
        self.tables = [self.filled(length) for length in lengths]
        self.num_pages = sum(lengths)
        self.makers: dict[str, Callable[[], Callable[[], object]]] = {
            "a table grows by a page": lambda: self.grow(1),
            "a table grows by 64 pages": lambda: self.grow(CHUNK),
            "64 pages written and sealed": self.seal,
            "64 pages found and shared": self.share,
            "a table of 64 pages ends": self.end,
        }

    def filled(self, length: int) -> BlockTable:
        table = BlockTable(self.pool, BLOCK_SIZE)
        table.append(length * BLOCK_SIZE, NO_PLAN)
        self.write(table, 0)
        return table

    def write(self, table: BlockTable, first: int) -> None:
        parent = NO_PAGE if first == 0 else LogicalPageId(table.pages[first - 1])
        for page in map(LogicalPageId, table.pages[first:]):
            self.pool.publish(page)
            parent = self.pool.seal(page, self.rng.randbytes(32), parent)

    def grow(self, count: int) -> Callable[[], object]:
        table = self.tables[self.rng.randrange(len(self.tables))]
        first = len(table)
        if first and not self.pool.sealed(LogicalPageId(table.pages[-1])):
            self.write(table, next(i for i in range(first) if not self.pool.sealed(LogicalPageId(table.pages[i]))))
        return lambda: table.append(count * BLOCK_SIZE, NO_PLAN)

    def seal(self) -> Callable[[], object]:
        table = BlockTable(self.pool, BLOCK_SIZE)
        table.append(CHUNK * BLOCK_SIZE, NO_PLAN)
        return lambda: self.write(table, 0)

    def share(self) -> Callable[[], object]:
        table, other = self.filled(CHUNK), BlockTable(self.pool, BLOCK_SIZE)
        return lambda: other.adopt(table)

    def end(self) -> Callable[[], object]:
        return self.filled(CHUNK).free

    def run(self, name: str, count: int) -> Iterator[float]:
        """CPU microseconds of each of that many changes of one kind."""
        for _ in range(count):
            change = self.makers[name]()
            start = time.thread_time_ns()
            change()
            yield (time.thread_time_ns() - start) / 1e3


def rss_bytes() -> int:
    """What this process has in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def fill(size: int, seed: int, found: dict[str, object], say: Callable[[str], None]) -> Fleet:
    """A fleet of that many sequences; says what it takes."""
    mean = (MOST_PAGES - FEWEST_PAGES) / math.log(MOST_PAGES / FEWEST_PAGES)
    predicted = size * mean * (ENTRY_BYTES + DIGEST_BYTES)
    say(f"{size:,} sequences: predicted {size * mean / 1e6:.1f} million pages, {predicted / 2**30:.2f} GiB")
    before, start = rss_bytes(), time.thread_time()
    fleet = Fleet(seed)
    fleet.fill(size)
    gc.collect()
    taken, tables, pages = rss_bytes() - before, fleet.table_bytes(), fleet.num_pages
    say(
        f"  measured {pages / 1e6:.1f} million pages, {taken / 2**30:.2f} GiB, {taken / pages:.1f} bytes a page "
        f"({tables / pages:.1f} of them tables and digests)\n"
        f"  filled by {fleet.num_events:,} events in {time.thread_time() - start:.0f} CPU s, making them included"
    )
    found[f"memory of {size}"] = {"pages": pages, "rss": taken, "tables": tables}
    return fleet


def time_pairs(
    pair: Sequence[Kinds] | Sequence[Leader], repeats: int, found: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """A line for each kind, the smaller size and the larger timed in turns; the figures stand in `found`."""
    for name in pair[0].makers:
        turn = max(2, repeats // 50) if name.startswith("place 65") else max(1, repeats // TURNS)
        small: list[float] = []
        large: list[float] = []
        for _ in range(TURNS):
            small.extend(pair[0].run(name, turn))
            large.extend(pair[1].run(name, turn))
        medians = statistics.median(small), statistics.median(large)
        ratio = medians[1] / medians[0]
        found[name] = {"median_us": medians, "max_us": (max(small), max(large)), "ratio": ratio}
        yield f"  {name:<34}{medians[0]:9.1f}{medians[1]:10.1f}{ratio:8.2f}{max(small):12.0f}{max(large):10.0f}"


def time_whole(fleet: Fleet, found: dict[str, object]) -> str:
    """A shard that is connected to anew tells everything in one message."""
    event = fleet.whole(0)
    pages, start = len(event.events.entry_index), time.thread_time()
    fleet.on(event)
    spent = time.thread_time() - start
    assert len(fleet.core.view.shards[0].sequences) == len([each for each in fleet.running if each.shard_id == 0])
    found[f"whole of {len(fleet.running)}"] = {"seconds": spent, "pages": pages}
    return f"  a shard told anew{pages:>12,} pages {spent:12.2f} s {spent / pages * 1e6:8.2f} us a page"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--sequences", default="1000,10000", help="the two sizes (1000,10000)")
    parser.add_argument("--repeats", type=int, default=200, help="timed events of each kind (200)")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args(argv)
    sizes = [int(text) for text in options.sequences.split(",")]
    if len(sizes) != 2 or not 64 <= sizes[0] <= sizes[1]:
        parser.error(f"--sequences: got {options.sequences}, must be two sizes of at least 64, the smaller first")

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    found: dict[str, object] = {}
    timed: dict[str, dict[str, Any]] = {}
    head = f"{sizes[0]:>9,}{sizes[1]:>10,}   ratio       max of each"
    fleets = [fill(size, options.seed, found, say) for size in sizes]
    say(f"\n{'CPU microseconds of an event':<36}{head}")
    for line in time_pairs([Kinds(fleet, options.seed) for fleet in fleets], options.repeats, timed):
        say(line)
    for fleet in fleets:
        say(time_whole(fleet, found))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fleets.clear()  # each leader is a process of its own, and its pages are not the scheduler's memory
    before = rss_bytes()
    leaders = [Leader(size // NUM_SHARDS, options.seed) for size in sizes]
    pages = sum(leader.num_pages for leader in leaders)
    say(f"\n{f'and inside one of the {NUM_SHARDS} shards':<36}{head}")
    for line in time_pairs(leaders, options.repeats, timed):
        say(line)
    say(f"  a page of a leader, with its whole digest: {(rss_bytes() - before) / pages:.0f} bytes")
    worst = max(each["ratio"] for each in timed.values())
    met = peak <= MOST_BYTES and worst <= MOST_RATIO
    say(f"\npeak of the process, both fleets and their generator: {peak / 2**30:.2f} GiB (at most {MOST_BYTES >> 30})")
    say(f"largest ratio: {worst:.2f} (at most {MOST_RATIO}): {'met' if met else 'MISSED'}")
    if options.json:
        print(json.dumps(found | {"events": timed, "peak_rss": peak, "worst_ratio": worst, "met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
