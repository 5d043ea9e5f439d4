"""A process that is one rank after another, of whatever layout the test asks for: torch takes seconds to start.

stdin   JSON lines: settings as `python -m worker` takes them, or null to stop being a rank; its end is the end
stdout  "up", then "is" or "was" for each line
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from worker.config import ShardConfig
from worker.layout import Layout
from worker.model_config import ModelConfig
from worker.rank import Rank
from worker.shard import ShardSpec, build_rank
from worker.ways import Ways


def spec_of(settings: dict[str, Any]) -> ShardSpec:
    folder = Path(settings["folder"])
    model, config = ModelConfig.from_folder(folder), ShardConfig(**settings["shard"])
    layout, ways = Layout(**settings["layout"]), Ways(**settings["ways"])
    device, threads = settings["device_id"], settings["threads"]
    return ShardSpec(folder, model, config, settings["dtype"], layout, device, ways, threads=threads)


def main() -> None:
    print("up", flush=True)
    rank: Rank | None = None
    thread: threading.Thread | None = None
    for line in sys.stdin:
        settings = json.loads(line)
        if rank is not None and thread is not None:
            rank.stop()
            thread.join()
            rank = thread = None
        if settings is not None:
            host, port = settings["leader"]
            secret = bytes.fromhex(settings["secret"])
            rank = build_rank(spec_of(settings), settings["rank"], secret, (host, port))
            thread = threading.Thread(target=rank.run)
            thread.start()
        print("was" if settings is None else "is", flush=True)
    if rank is not None:
        rank.stop()


if __name__ == "__main__":
    main()
