"""`python -m worker`: one rank's process, supervised by a keeper over pipes.

stdin   one JSON line with the shard's settings; then nothing: when the keeper's end closes, this process ends
stdout  JSON lines: {"loading": [bytes done, bytes in all]}, {"ready": hex of ShardInfo} or {"failed": {"code",
"message"}}; of a leader, {"over": why} when an epoch ends and "ready" again when the next has begun; of a rank that
follows, {"ready": ""} when its weights are loaded and {"alive": n} every second

Nothing of it is for people; logs go to stderr. The process also dies with its parent by PDEATHSIG where there is one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from pagetable.errors import QuireError
from quire_pb.worker.v1 import worker_pb2 as pb

_PR_SET_PDEATHSIG = 1
BEAT_SECONDS = 1.0
STEP_PART = 0.8  # of the scheduler's limit, which ends the leader with all its weights
_saying = threading.Lock()


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
        if settings.get("rank", 0):
            return _follow(settings)
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


def _spec(settings: dict[str, Any]) -> Any:
    from worker.config import ShardConfig
    from worker.layout import Layout
    from worker.model_config import ModelConfig
    from worker.shard import ShardSpec
    from worker.ways import Ways

    folder = Path(settings["folder"])
    return ShardSpec(
        folder,
        ModelConfig.from_folder(folder),
        ShardConfig(**settings["shard"]),
        settings["dtype"],
        Layout(**settings.get("layout", {})),
        settings["device_id"],
        Ways(**settings.get("ways", {})),
        settings.get("device", "cpu"),
        settings["threads"],
    )


def _loading(done: int, total: int) -> None:
    _say(loading=[done, total])


def _follow(settings: dict[str, Any]) -> int:
    """A rank that is not the leader, until stdin ends or SIGTERM comes."""
    from worker.cores import Cores

    cores = Cores.claim(settings["threads"]) if settings.get("pin") else Cores()
    cores.stay()  # and whatever thread torch may start

    from worker.shard import build_rank

    secret, (host, port) = bytes.fromhex(settings["secret"]), settings["leader"]

    def fenced(why: str) -> None:
        _say(failed={"code": "INTERNAL", "message": f"rank {settings['rank']} was ended by its leader: {why}"})
        os._exit(1)

    where = settings.get("host", "")
    rank = build_rank(_spec(settings), settings["rank"], secret, (host, port), where, _loading, fenced, cores)
    signal.signal(signal.SIGTERM, lambda *_: rank.stop())
    threading.Thread(target=_await_end, name="keeper", daemon=True).start()
    threading.Thread(target=_beat, name="beat", daemon=True).start()
    _say(ready="")
    rank.run()
    return 0


def _build(settings: dict[str, Any]) -> Any:
    from worker.cores import Cores
    from worker.server import ShardServer
    from worker.shard import build_runner, make_loop, make_pipe, make_ranks, page_identity

    spec = _spec(settings)
    secret, epoch = bytes.fromhex(settings["secret"]), settings["epoch"]
    ranks = None
    if spec.layout.num_ranks > 1:
        ranks = make_ranks(spec, secret, Cores.claim(spec.threads) if settings.get("pin") else None)
        ranks.step_seconds = STEP_PART * settings["step_limit"]
        ranks.listen(*settings["leader"])
        with ranks.cores.hold():
            ranks.runner = build_runner(spec, 0, _loading)
        epoch = ranks.begin(epoch)
        loop = make_loop(spec, ranks)
    else:
        loop = make_loop(spec, make_pipe(spec, build_runner(spec, 0, _loading)))
    config, model = spec.config, spec.model
    info = pb.ShardInfo(
        shard_id=settings["shard_id"],
        epoch=epoch,
        pid=os.getpid(),
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=model.vocab_size,
        identity=page_identity(model, config, settings["dtype"]),
        dtype=settings["dtype"],
        device_ids=spec.devices,
        model=settings["model"],
        eos_token_ids=array("i", model.eos_token_ids).tobytes(),
        block_bytes=spec.device_block_bytes,
    )

    def on_epoch(why: str, info: pb.ShardInfo | None) -> None:
        if info is None:
            _say(over=why)
        else:
            _say(ready=info.SerializeToString().hex())

    return ShardServer(loop, info, secret, ranks, lambda: make_loop(spec, ranks or loop.pipe), on_epoch)


def _beat() -> None:
    """A process that is stopped says nothing, and its keeper hears it."""
    for number in itertools.count():
        _say(alive=number)
        time.sleep(BEAT_SECONDS)


def _say(**line: Any) -> None:
    with contextlib.suppress(BrokenPipeError), _saying:  # broken: the keeper is gone; stdin says so too
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
