"""What people watch while weights load: a bar for each rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RankProgress = Callable[[int, int, int], None]  # rank, bytes done, bytes in all


@contextmanager
def loading_bar() -> Iterator[RankProgress]:
    """Bars on stderr, one for each rank that was heard of."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[int, TaskID] = {}

        def show(rank: int, done: int, total: int) -> None:
            if rank not in tasks:
                tasks[rank] = bar.add_task("weights" if rank == 0 else f"rank {rank}")
            bar.update(tasks[rank], completed=done, total=total)

        yield show


def summed(progress: Callable[[int, int], None], num_ranks: int) -> RankProgress:
    """One (bytes done, bytes in all) of all ranks; said from when all have begun."""
    seen: dict[int, tuple[int, int]] = {}
    lock = threading.Lock()

    def tell(rank: int, done: int, total: int) -> None:
        with lock:
            seen[rank] = done, total
            if len(seen) == num_ranks:
                progress(sum(each for each, _ in seen.values()), sum(each for _, each in seen.values()))

    return tell
