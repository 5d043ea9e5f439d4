"""`python -m cluster scheduler|keeper|front`: one process of a service, supervised by its parent over pipes.

stdin   one JSON line with the process's settings; then nothing: when the parent's end closes, this process ends
stdout  JSON lines: {"ready": ...} or {"failed": {"code", "message"}}, and what else the part has to say

The end of stdin and SIGTERM both cancel the part, which then ends in good order; SIGINT is the parent's to take.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from cluster.processes import new_event_loop
from pagetable.errors import QuireError

PARTS = ("scheduler", "keeper", "front")
Main: TypeAlias = Callable[[dict[str, Any], Callable[..., None]], Coroutine[Any, Any, int]]


def main(arguments: list[str]) -> int:
    """The exit status: 0 after a wanted end, 1 where the part could not start, 2 for a wrong command."""
    if len(arguments) != 1 or arguments[0] not in PARTS:
        print(f"usage: python -m cluster {'|'.join(PARTS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format=f"%(asctime)s {arguments[0]} %(process)d %(message)s", level=logging.WARNING)
    try:
        settings = json.loads(sys.stdin.readline() or "null")
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        return 1
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(_serve(_part(arguments[0]), settings))
    except QuireError as error:
        _say(failed={"code": error.code, "message": str(error)})
    except OSError as error:
        _say(failed={"code": "UNAVAILABLE", "message": f"the {arguments[0]}'s socket: {error.strerror}"})
    return 1


def _part(name: str) -> Main:
    """Imported when asked for: a scheduler needs neither gRPC nor a tokenizer."""
    part: Main
    if name == "scheduler":
        from cluster.scheduler_server import main as part
    elif name == "keeper":
        from cluster.keeper import main as part
    else:
        from cluster.front_process import main as part
    return part


async def _serve(part: Main, settings: dict[str, Any]) -> int:
    loop = asyncio.get_running_loop()
    task: asyncio.Task[int] = loop.create_task(part(settings, _say))
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    threading.Thread(target=_await_end, args=(loop, task), name="parent", daemon=True).start()
    try:
        return await task
    except asyncio.CancelledError:
        return 0


def _await_end(loop: asyncio.AbstractEventLoop, task: asyncio.Task[int]) -> None:
    """The parent's end of the pipe closed."""
    while sys.stdin.read(1):
        pass
    with contextlib.suppress(RuntimeError):  # the loop is over already
        loop.call_soon_threadsafe(task.cancel)


def _say(**line: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone; stdin says so too
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
