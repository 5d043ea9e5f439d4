"""`make demo`: a cluster on this machine, streams over gRPC, and the pages behind them.

Two services run side by side, started as a user would start them: `story` on two shards under Ray, and `recall`,
which looks up facts in a long context. Ends with exit code 0 and no process left.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from launch.client import AsyncClient
from launch.models.recall_text import KEYS, WORDS, make_context
from launch.outputs import RequestOutput
from launch.remote import page_lines
from pagetable.errors import QuireError, RequestFailed, ServiceError
from quire_pb.memory.v1 import memory_pb2 as pb

START_SECONDS = 120.0
LONG_CONTEXT = 16_384  # tokens of facts
_READY = re.compile(r"ready on (\S+): ")
_OPENING = (
    "Once upon a time there was a brave girl named Tilda. She had a red map, and nobody else had such a map. "
    "Tilda also had a small hen, and they were always together."
)
_TOKENS = 224
_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("one", {"prompt": _OPENING, "seed": 1}),
    ("two", {"prompt": _OPENING, "seed": 2}),
    ("twins", {"prompt": _OPENING, "seed": 4, "n": 2}),
    ("other", {"prompt": "Once upon a time there was a", "seed": 3}),
    ("chat", {"messages": [{"role": "user", "content": "Tell me a story about a big dog."}], "seed": 6}),
)
_SPLIT: dict[str, Any] = {"prompt": "Once upon a time", "seed": 5, "min_tokens": 768, "max_tokens": 768}
_FORK_AT, _ATTEMPTS = 24, 50
_LAST_WORDS = "The end."  # the stream that is split would go on behind them, so that a slow client can still split it
_MAP_SECONDS = 0.02


class Show:
    """Prints sentences as they are complete, each behind the name of its stream, and keeps the figures."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first: list[float] = []
        self.tokens = 0
        self._printed: dict[tuple[str, int], int] = {}

    def grown(self, name: str, output: RequestOutput) -> None:
        for sample in output.outputs:
            key = name, sample.index
            if sample.token_ids and key not in self._printed:
                self._printed[key] = 0
                self.first.append(time.perf_counter() - self.began)
            at = self._printed.get(key, 0)
            end = len(sample.text) if sample.finish_reason else sample.text.rfind(". ") + 1
            if end > at:
                label = f"{name}.{sample.index}" if len(output.outputs) > 1 else name
                print(f"  {label:>8} | {sample.text[at:end].strip()}", flush=True)
                self._printed[key] = end

    def anew(self, name: str) -> None:
        """What comes next under this name is another text."""
        self._printed = {key: at for key, at in self._printed.items() if key[0] != name}

    def ended(self, name: str, output: RequestOutput, inherited: int = 0) -> None:
        for sample in output.outputs:
            rest = sample.text[self._printed.get((name, sample.index), 0) :].strip()
            if sample.finish_reason is None and rest.startswith(_LAST_WORDS):
                print(f"  {name:>8} | {_LAST_WORDS}", flush=True)
                self._printed[name, sample.index] = len(sample.text)
        self.tokens += sum(len(sample.token_ids) for sample in output.outputs) - inherited


@contextlib.asynccontextmanager
async def service(*arguments: str) -> AsyncIterator[AsyncClient]:
    """`quire serve` in a process of its own, and a client of it; stopped by SIGTERM. Raises where it doesn't end
    well."""
    command = (sys.executable, "-m", "launch.cli", "serve", *arguments, "--port", "0", "--metrics-port", "0")
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), START_SECONDS)).decode()
        found = _READY.match(line)
        if found is None:
            raise RequestFailed(f"quire serve {' '.join(arguments)} did not become ready; run it to see why")
        client = AsyncClient(found[1])
        yield client
        await client.close()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        status = await process.wait()
    if status != 0:
        raise RequestFailed(f"quire serve {' '.join(arguments)} ended with status {status}")


async def stories(client: AsyncClient, show: Show) -> None:
    """Six requests at once, one of them split in two while it runs; the page map while they do."""
    pages = Pages()
    watching = asyncio.create_task(pages.watch(client))
    try:
        await asyncio.gather(split(client, show, pages), *(story(client, show, name, raw) for name, raw in _REQUESTS))
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    pages.show()


async def story(client: AsyncClient, show: Show, name: str, raw: dict[str, Any]) -> None:
    output = None
    async for output in client.stream({"max_tokens": _TOKENS, "temperature": 0.7, **raw}):
        show.grown(name, output)
    if output is not None:
        show.ended(name, output)


async def split(client: AsyncClient, show: Show, pages: Pages) -> None:
    """A stream, and a fork of it. Again from the start where a slow client came too late: the stream had ended before
    its fork arrived, or no map was taken while both ran. The seed is the same, so its text is printed once."""
    for _ in range(_ATTEMPTS):
        if await _split_once(client, show, pages) and pages.shared is not None:
            return
    raise RequestFailed(f"in {_ATTEMPTS} attempts, no stream was forked while it ran and seen in the page map")


async def _split_once(client: AsyncClient, show: Show, pages: Pages) -> bool:
    """Whether it was forked."""
    child: asyncio.Task[bool] | None = None
    output = None
    async with contextlib.aclosing(client.stream({"temperature": 0.7, **_SPLIT})) as stream:
        async for output in stream:
            show.grown("split", output)
            if child is None and len(output.outputs[0].token_ids) >= _FORK_AT:
                pages.forked = None
                child = asyncio.create_task(_fork(client, show, pages, output))
            if child is not None and _LAST_WORDS in output.outputs[0].text and (pages.has_fork or child.done()):
                break
    if output is not None:
        show.ended("split", output)
    return child is not None and await child


async def _fork(client: AsyncClient, show: Show, pages: Pages, parent: RequestOutput) -> bool:
    output = None
    show.anew("fork")
    try:
        async for output in client.fork(parent.request_id, seed=50, min_tokens=0):
            pages.forked = output.request_id
            show.grown("fork", output)
    except ServiceError as error:
        if error.code != "NOT_FOUND":
            raise
        return False  # its parent had ended
    if output is not None:
        show.ended("fork", output, len(parent.outputs[0].token_ids))
    return output is not None


class Pages:
    """The page map, asked for from the start on: a slow client may hear of the fork when it is nearly over.

    Attributes:
        forked: the request that is a fork.
        shared: the last map with a shared page, or the first that has the fork too.
        has_fork: it has.
    """

    def __init__(self) -> None:
        self.forked: str | None = None
        self.shared: pb.GetPageMapResponse | None = None
        self.has_fork = False

    async def watch(self, client: AsyncClient) -> None:
        while not self.has_fork:
            page_map = await client.page_map()
            if page_map.shared_pages:
                self.shared = page_map
                self.has_fork = self.forked in {sequence.request_id for sequence in page_map.sequences}
            await asyncio.sleep(_MAP_SECONDS)

    def show(self) -> None:
        if self.shared is None:
            raise RequestFailed("no page was shared")
        show_pages(self.shared)


def show_pages(page_map: pb.GetPageMapResponse) -> None:
    users = {(shared.page.device_id, shared.page.block_id): shared.users for shared in page_map.shared_pages}
    lines = ["", "pages as (device_id, block_id), * shared, while all of them run:"]
    lines += [f"  {line}" for line in page_lines(page_map.sequences, users)]
    held = sum(len(sequence.pages) for sequence in page_map.sequences)
    saved = sum(count - 1 for count in users.values())
    lines.append(f"  {held} entries in {len(page_map.sequences)} tables, {held - saved} pages: sharing saved {saved}")
    print("\n".join([*lines, ""]), flush=True)


async def recall(client: AsyncClient) -> None:
    """Facts at both ends and in the middle of a long context; all questions but the first find the context's pages."""
    context = make_context(LONG_CONTEXT, range(len(KEYS)), seed=7)
    keys = list(context.facts)
    print(f"\nrecall: {len(keys)} facts in a context of {LONG_CONTEXT} tokens", flush=True)
    for key in (keys[0], keys[len(keys) // 2], keys[-1]):
        began = time.perf_counter()
        raw = {"prompt_token_ids": [*context.token_ids, key], "max_tokens": 1, "temperature": 0}
        output = await client.complete(raw)
        seconds, answer = time.perf_counter() - began, output.outputs[0].token_ids[0]
        found = f"{output.num_cached_tokens} tokens were in pages already"
        print(f"  {WORDS[key]}, {len(context.token_ids) - context.positions[key]} tokens ago: {WORDS[answer]}", end="")
        print(f"   ({seconds:.2f} s, {found})", flush=True)
        if answer != context.facts[key]:
            raise RequestFailed(f"recall: {WORDS[key]} is {WORDS[context.facts[key]]}, the answer was {WORDS[answer]}")


async def run() -> None:
    began = time.perf_counter()
    print("starting: `quire serve story -dp 2` (Ray) and `quire serve recall --no-ray`", flush=True)
    engine = ("--max-num-seqs", "16", "--num-gpu-blocks-override", "1024")
    long = ("--max-num-seqs", "4", "--max-model-len", "32768", "--num-gpu-blocks-override", "2048", "--no-ray")
    async with service("story", "-dp", "2", *engine) as story, service("recall", *long) as facts:
        print(f"ready after {time.perf_counter() - began:.1f} s\n", flush=True)
        show = Show()
        await stories(story, show)
        seconds = time.perf_counter() - show.began
        rate, first = show.tokens / seconds, statistics.median(show.first) * 1000
        print(
            f"\n{show.tokens} tokens in {seconds:.2f} s: {rate:.0f} tokens/s; median time to first token {first:.0f} ms"
        )
        await recall(facts)
        print("\nstopping", flush=True)
    print(f"all of it took {time.perf_counter() - began:.1f} s", flush=True)


def main() -> int:
    try:
        asyncio.run(run())
    except QuireError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
