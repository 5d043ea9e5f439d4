"""`python -m cluster front`, and Ray's front actor: one FrontServer from its settings to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

from cluster.front_config import FrontConfig
from cluster.front_server import FrontServer


class Say(Protocol):
    """Tells the parent: `say(ready={...})` is one status line."""

    def __call__(self, **line: Any) -> None: ...


async def main(settings: Mapping[str, Any], say: Say) -> int:
    """Serve until cancelled; then finish what runs, for `drain_seconds` at most. A second cancel ends that, too.

    Args:
        settings: see FrontConfig; the secret in hex.
        say: told ready={"port", "metrics_port"} once it listens, draining={"seconds"} when the end begins, and stop={}
            when somebody asks for the whole service's end on the admin socket.

    Raises ConfigError and ModelError where it can't be.
    """
    server = FrontServer(FrontConfig.from_settings(settings), lambda: say(stop={}))
    try:
        port, metrics_port = await server.start()
        say(ready={"port": port, "metrics_port": metrics_port})
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        say(draining={"seconds": server.config.drain_seconds})
        with contextlib.suppress(asyncio.CancelledError):
            await server.drain(server.config.drain_seconds)
    finally:
        await server.stop()
    return 0
