"""The first process of a pretend host: gives it a /tmp, /run, /dev/shm, names and users of its own, and reaps orphans.

    python -I -S init.py NAME FOLDER [PATH ...]

FOLDER holds `etc/` (each file in it replaces the machine's) and becomes the host's /tmp (`tmp/`). PATHs below /tmp stay
what they are on the machine. Says `up`; ends, and with it every process of the host, when its stdin ends.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from pathlib import Path

REAP_SECONDS = 0.1


def main(name: str, folder: Path, kept: list[Path]) -> None:
    socket.sethostname(name)
    tmp = folder / "tmp"
    for path in kept:
        if path.is_relative_to("/tmp") and not any(path.is_relative_to(other) for other in kept if other != path):
            place = tmp / path.relative_to("/tmp")
            place.mkdir(parents=True, exist_ok=True)
            _mount("--bind", path, place)
    for file in (folder / "etc").iterdir():
        _mount("--bind", file, Path("/etc") / file.name)
    _mount("-t", "tmpfs", "tmpfs", "/run")
    Path("/run/sshd").mkdir()  # sshd wants it
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    _mount("--rbind", tmp, "/tmp")
    print("up", flush=True)
    while not (select.select([sys.stdin], [], [], REAP_SECONDS)[0] and not os.read(sys.stdin.fileno(), 1)):
        _reap()


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _reap() -> None:
    """Daemons are orphans, and a zombie that nobody waits for looks alive to `ray stop`."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
