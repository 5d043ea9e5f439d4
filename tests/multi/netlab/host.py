"""One pretend host: its files, its first process, its cable."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.multi.netlab.job import Job, LabError
from tests.multi.netlab.namespaces import UNSHARE, do, end, first_process
from tests.serving import SECONDS, command_line

if TYPE_CHECKING:
    from tests.multi.netlab.lab import Lab

GATEWAY = "10.77.0.254"  # nobody is there: the hosts have a default route because real ones do
_HERE = Path(__file__).resolve().parent
_ENTER = ("--net", "--pid", "--mount", "--uts", "--ipc")


class Host:
    """One pretend host; a Lab makes it.

    Attributes:
        name, address: `a` and 10.77.0.1, and so on.
        home: HOME of its only user, root.
        environment: of every command. Nothing of Ray's and Quire's own from the shell gets there.
    """

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._lab, self._folder = lab, lab.folder / name
        self.home = self._folder / "home"
        self._write_files()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "QUIRE_", "SSH_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/sbin:/usr/bin:/sbin:/bin"])
        self.environment = {**inherited, "HOME": str(self.home), "PATH": path, "USER": "root"}
        self.environment.pop("TMPDIR", None)
        self._init: subprocess.Popen[str] | None = None
        self._pid = 0
        self._port = ""
        self.boot()

    def boot(self) -> None:
        """Power on. What it had on its disk is still there."""
        assert self._init is None, f"host {self.name} is on"
        init = [sys.executable, "-I", "-S", str(_HERE / "init.py"), self.name, str(self._folder), *self._lab.kept]
        self._init, self._pid = first_process([*UNSHARE, *init], self.environment)
        self._port = self._lab.new_port()
        switch = str(self._lab.switch)
        link = ["type", "veth", "peer", "name", "eth0", "netns", str(self._pid)]
        do("ip", "link", "add", self._port, "netns", switch, *link)
        inside = f"ip link set lo up && ip addr add {self.address}/24 dev eth0 && ip link set eth0 up"
        do("nsenter", "-t", str(self._pid), "--net", "sh", "-c", f"{inside} && ip route add default via {GATEWAY}")
        self._lab.on_switch(f"ip link set {self._port} master br0 up")

    def power_off(self) -> None:
        """Every process on it dies at once, and its cable goes dark: nobody is told by a FIN."""
        if self._init is not None:
            self.cut()
            self.close()

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Job:
        """Run a command there, in HOME; it goes on until it ends, is killed, or the host is off."""
        enter = ["nsenter", "-t", str(self._pid), *_ENTER, "env", "-C", str(self.home)]
        return Job([*enter, *command], {**self.environment, **(environment or {})})

    def run(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, seconds: float = SECONDS
    ) -> str:
        """Run a command there to its end; what it said. LabError where it fails or takes longer."""
        job = self.start(command, environment)
        try:
            status = job.wait(seconds)
        except LabError:
            job.kill()
            raise
        if status != 0:
            raise LabError(f"on host {self.name}:\n{job}")
        return "\n".join(job.lines)

    def python(self, *words: str) -> list[str]:
        """The command of this interpreter, without the current folder on its path."""
        return [sys.executable, "-P", *words]

    def processes(self, part: str = "") -> list[int]:
        """Pids of the host's processes, as the machine counts them, whose command line holds `part`; not its first."""
        if self._init is None:
            return []
        own = os.stat(f"/proc/{self._pid}/ns/pid").st_ino
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid = int(folder.name)
                if pid != self._pid and (folder / "ns/pid").stat().st_ino == own and part in command_line(pid):
                    found.append(pid)
        return sorted(pid for pid in found if command_line(pid))  # a zombie has no command line

    def cut(self) -> None:
        """Nothing reaches the host any more and nothing leaves it; neither side is told."""
        self._lab.on_switch(f"ip link set {self._port} nomaster")

    def heal(self) -> None:
        self._lab.on_switch(f"ip link set {self._port} master br0")

    def close(self) -> None:
        """As `power_off`, for good: no host is left that could be told."""
        if self._init is not None:
            end(self._init)
            self._init = None

    def _write_files(self) -> None:
        etc = self._folder / "etc"
        for folder in (etc, self.home, self._folder / "tmp"):
            folder.mkdir(parents=True)
        (self._folder / "tmp").chmod(0o1777)
        (etc / "passwd").write_text(
            f"root:x:0:0:root:{self.home}:/bin/bash\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        )
        (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        (etc / "hostname").write_text(f"{self.name}\n")
        # as Debian has it: a host's own name is a loopback address
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        (etc / "resolv.conf").write_text("")
        for name in [path.name for path in etc.iterdir() if not (Path("/etc") / path.name).exists()]:
            (etc / name).unlink()  # no place to mount it on
