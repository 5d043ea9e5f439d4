"""Processes that hold namespaces, and whether this machine lets us have any."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache

from tests.multi.netlab.job import LabError
from tests.serving import children

UNSHARE = ["unshare", "--kill-child", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "--ipc"]


@cache
def missing(*programs: str) -> str:
    """Why there can be no lab here that runs `programs`; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "pretend hosts need Linux and root"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    wanted = ("ip", "unshare", "nsenter", "mount", *programs)
    if absent := [name for name in wanted if shutil.which(name, path=path) is None]:
        return f"pretend hosts need {', '.join(absent)}"
    trial = "mount -t tmpfs tmpfs /run && ip link add br0 type bridge && ip link add x type veth peer name y"
    done = subprocess.run([*UNSHARE, "sh", "-c", trial], capture_output=True, text=True)
    return f"pretend hosts need namespaces, bridge and veth: {done.stderr.strip()}" if done.returncode else ""


def first_process(
    command: list[str], environment: Mapping[str, str], forks: bool = True
) -> tuple[subprocess.Popen[str], int]:
    """Start what holds namespaces and wait until it says `up`; the process and the pid inside the namespaces."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    if process.stdout.readline() != "up\n":
        process.kill()
        raise LabError(f"{' '.join(command)}: {process.stderr.read()}")
    return process, children(process.pid)[0] if forks else process.pid


def end(process: subprocess.Popen[str]) -> None:
    """Close its stdin and see it go, and with it everything inside."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.close()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()  # takes what it has forked with it
        process.wait()
    process.stdout.close()
    process.stderr.close()


def do(*command: str) -> None:
    """Run a short command on the machine. LabError with what it says where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
