"""`quire serve --detach`: the same command in a session of its own, which this one waits for and leaves."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pagetable.errors import ConfigError, RequestFailed

_POLL_SECONDS = 0.05


def detach(argv: Sequence[str]) -> int:
    """Start `quire argv` without --detach, print its ready line and how to stop it. An interrupt ends it, too."""
    log = _log_file()
    command = [sys.executable, "-P", "-m", "launch.cli", *(word for word in argv if word != "--detach")]
    with log.open("wb") as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _path()},
        )
    try:
        ready = _await_ready(child, log)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    print(ready, flush=True)
    print(f"quire: runs as process {child.pid}; stop it with: {_how(log)}", file=sys.stderr)
    print(f"quire: what it says goes to {log}", file=sys.stderr)
    return 0


def _await_ready(child: subprocess.Popen[bytes], log: Path) -> str:
    while True:
        status = child.poll()
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        ready = [line for line in lines if line.startswith("ready on ")]
        if ready:
            return ready[0]
        if status is not None:
            said = next((line for line in reversed(lines) if line.startswith("quire: error: ")), "it does not say why")
            raise RequestFailed(said.removeprefix("quire: error: "))
        time.sleep(_POLL_SECONDS)


def _how(log: Path) -> str:
    found = re.search(r"to end the service: (.+)", log.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else "quire stop"


def _log_file() -> Path:
    """A new file that only this user can read."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = Path(home) / "quire"
    path = folder / f"serve-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        limit = f"be able to write its log below {home} ({(error.strerror or 'it cannot').lower()})"
        raise ConfigError("--detach", str(path), limit, "set XDG_STATE_HOME to a folder of yours") from None
    return path


def _path() -> str:
    from cluster.processes import environment

    return environment()["PYTHONPATH"]
