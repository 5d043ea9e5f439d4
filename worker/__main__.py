"""`python -m worker`: one shard's process, supervised by a keeper over pipes.

stdin   one JSON line with the shard's settings; then nothing: when the keeper's end closes, this process ends
stdout  JSON lines: {"loading": [bytes done, bytes in all]}, {"ready": hex of ShardInfo} or {"failed": {"code",
"message"}}

Nothing of it is for people; logs go to stderr. The process also dies with its parent by PDEATHSIG where there is one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
from array import array
from pathlib import Path
from typing import Any

from pagetable.errors import QuireError
from quire_pb.worker.v1 import worker_pb2 as pb

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve until stdin ends or SIGTERM comes; 1 where the model could not be loaded."""
    _die_with_parent()
    sys.setswitchinterval(0.0005)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the keeper, which drains first
    logging.basicConfig(format="%(asctime)s worker %(process)d %(message)s", level=logging.WARNING)
    settings = json.loads(sys.stdin.readline() or "null")
    if not isinstance(settings, dict):
        return 1
    try:
        server = _build(settings)
        server.start(settings["host"], settings["port"])
    except QuireError as error:
        _say(failed={"code": error.code, "message": str(error)})
        return 1
    except OSError as error:
        _say(failed={"code": "UNAVAILABLE", "message": f"the shard's socket: {error.strerror}"})
        return 1
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    threading.Thread(target=_await_end, name="keeper", daemon=True).start()
    _say(ready=server.info.SerializeToString().hex())
    server.run()
    return 0


def _build(settings: dict[str, Any]) -> Any:
    from worker.config import ShardConfig
    from worker.kv_cache import PagedKVCache
    from worker.model_config import ModelConfig
    from worker.server import ShardServer
    from worker.shard import build_loop, page_dtype, page_identity

    folder = Path(settings["folder"])
    model = ModelConfig.from_folder(folder)
    config = ShardConfig(**settings["shard"])
    loop = build_loop(
        folder,
        model,
        config,
        settings["dtype"],
        settings["device_id"],
        settings["threads"],
        lambda done, total: _say(loading=[done, total]),
    )
    info = pb.ShardInfo(
        shard_id=settings["shard_id"],
        epoch=settings["epoch"],
        pid=os.getpid(),
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=model.vocab_size,
        identity=page_identity(model, config, settings["dtype"]),
        dtype=settings["dtype"],
        device_ids=[settings["device_id"]],
        model=settings["model"],
        eos_token_ids=array("i", model.eos_token_ids).tobytes(),
        block_bytes=PagedKVCache.bytes_per_block(model, config.block_size, page_dtype(config, settings["dtype"])),
    )
    return ShardServer(loop, info, bytes.fromhex(settings["secret"]))


def _say(**line: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the keeper is gone; stdin says so too
        print(json.dumps(line), flush=True)


def _await_end() -> None:
    """The keeper's end of the pipe closed: nobody wants this process any more, whatever it is doing."""
    while sys.stdin.read(1):
        pass
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
