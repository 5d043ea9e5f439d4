"""Pretend hosts on one machine: each has network, PID, mount, UTS and IPC namespaces, a bridge joins them.

    the machine      switch: a network namespace with the bridge br0
      pytest           p1 ------------ eth0  host a   10.77.0.1   own /tmp, /run, /dev/shm, HOME, users, processes
                       p2 ------------ eth0  host b   10.77.0.2

Nothing has a name on the machine: namespaces live as long as their first process, which ends with a pipe that the test
holds. So two labs never clash, not even in addresses, and none outlives its test, whatever kills that.

Files are the machine's, read and written alike, but for /tmp, /run and HOME. Pids are seen from the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.multi.netlab.host import Host
from tests.multi.netlab.job import Job
from tests.multi.netlab.namespaces import do, end, first_process

ROOT = Path(__file__).resolve().parent.parent.parent.parent
NAMES = "abcdefgh"
NETWORK = "10.77.0"
_HERE = Path(__file__).resolve().parent


class Lab:
    """A switch and its hosts. `close` it.

    Args:
        count: of hosts.

    Attributes:
        folder: of this lab alone, the same on all hosts and on the machine; gone when it is closed.
        switch: pid that holds the bridge's network namespace.
    """

    def __init__(self, count: int) -> None:
        assert 1 <= count <= len(NAMES)
        self.folder = Path(tempfile.mkdtemp(prefix="netlab"))  # short: the path of a Unix socket has 107 bytes
        self.kept = sorted({*map(str, (self.folder, ROOT, sys.prefix, sys.base_prefix))})
        self.hosts: list[Host] = []
        self._ports = 0
        self._doors: list[Job] = []
        self._switch: subprocess.Popen[str] | None = None
        try:
            idle = ["sh", "-c", "ip link add br0 type bridge && ip link set br0 up && echo up && exec cat"]
            self._switch, self.switch = first_process(["unshare", "--net", *idle], os.environ, forks=False)
            for index in range(count):
                self.hosts.append(Host(self, NAMES[index], f"{NETWORK}.{index + 1}"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Every process of every host ends, and the lab's files are gone."""
        for host in self.hosts:
            host.close()
        if self._switch is not None:
            end(self._switch)
        shutil.rmtree(self.folder, ignore_errors=True)

    def door(self, host: Host, target: str) -> str:
        """For clients in the test's own process: a gRPC target that connects to `target` from `host`."""
        path = self.folder / f"door{len(self._doors)}"
        job = host.start(host.python(str(_HERE / "door.py"), str(path), target))
        self._doors.append(job)
        job.wait_line("^open$")
        return f"unix:{path}"

    def new_port(self) -> str:
        self._ports += 1
        return f"p{self._ports}"

    def on_switch(self, command: str) -> None:
        do("nsenter", "-t", str(self.switch), "--net", *command.split())
