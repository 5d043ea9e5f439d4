"""The lab of pretend hosts that other tests stand on."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.processes import environment
from tests.multi.netlab.job import LabError
from tests.multi.netlab.lab import Lab
from tests.serving import SECONDS, Processes, until

_ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 8000), int(sys.argv[2])).recv(9).decode())"
_LONG = "60"
_ANSWER = """
import socket
server = socket.create_server(("", 8000))
print("listens", flush=True)
while True:
    server.accept()[0].sendall(socket.gethostname().encode())
"""


def test_hosts_of_one_lab_meet_and_those_of_two_never_do(make_lab: Callable[..., Lab]) -> None:
    first, second = make_lab(2), make_lab(2)
    for lab in (first, second):  # with the same addresses at the same time
        a, b = lab.hosts
        b.start(b.python("-c", _ANSWER)).wait_line("^listens$")
        assert a.run(a.python("-c", _ASK, b.address, _LONG)) == "b"
        with pytest.raises(LabError, match="refused"):
            a.run(a.python("-c", _ASK, "127.0.0.1", _LONG))
        (a.home / "mine").touch()
        assert a.run(["ls"]) == "mine" and b.run(["ls"]) == ""
        a.run(["touch", "/tmp/mine", "/dev/shm/mine"])
        assert b.run(["find", "/tmp", "/dev/shm", "-maxdepth", "1", "-name", "mine"]) == ""
        assert not Path("/tmp/mine").exists() and not Path("/dev/shm/mine").exists()
        assert a.run(["sh", "-c", "echo ~; hostname"]) == f"{a.home}\na"


def test_a_cut_host_is_silent_until_it_is_healed(make_lab: Callable[..., Lab]) -> None:
    a, b = make_lab(2).hosts
    b.start(b.python("-c", _ANSWER)).wait_line("^listens$")
    ask = a.python("-c", _ASK, b.address)
    b.cut()
    with pytest.raises(LabError, match=r"timed out|No route"):
        a.run([*ask, "1"])
    b.heal()
    assert a.run([*ask, _LONG]) == "b"


def test_a_host_without_power_has_no_processes_and_its_disk_outlives_it(make_lab: Callable[..., Lab]) -> None:
    a, b = make_lab(2).hosts
    job = b.start(b.python("-c", _ANSWER))
    job.wait_line("^listens$")
    assert b.processes("-c") == [job.pid]
    (b.home / "kept").touch()
    b.power_off()
    assert job.wait() != 0 and b.processes() == []
    b.boot()
    assert b.run(["ls"]) == "kept"
    b.start(b.python("-c", _ANSWER)).wait_line("^listens$")
    assert a.run(a.python("-c", _ASK, b.address, _LONG)) == "b"


def test_a_command_that_fails_or_hangs_is_an_error_with_what_it_said(make_lab: Callable[..., Lab]) -> None:
    (a,) = make_lab(1).hosts
    with pytest.raises(LabError, match=r"(?s)on host a.*status 3.*told you"):
        a.run(["sh", "-c", "echo told you; exit 3"])
    with pytest.raises(LabError, match="still runs after 1 s"):
        a.run(["sleep", "1000"], seconds=1)
    job = a.start(["sh", "-c", "echo one; exec sleep 1000"])
    with pytest.raises(LabError, match=r"(?s)never said '\^two'.*one"):
        job.wait_line("^two", seconds=1)
    job.kill(signal.SIGTERM)
    assert job.wait() != 0
    assert a.processes("sleep") == []


def test_nothing_outlives_a_test_run_that_is_killed(make_lab: Callable[..., Lab]) -> None:
    make_lab(1).close()  # or skip
    code = "from tests.multi.netlab.lab import Lab; lab = Lab(2); lab.hosts[0].start(['sleep', '1000']); "
    code += "print(lab.folder, flush=True); input()"
    runner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert runner.stdout is not None
        folder = Path(runner.stdout.readline().strip())
        known = Processes(runner.pid)
        assert len(known.known) >= 5  # a switch, two hosts and a command
    finally:
        runner.kill()
        runner.communicate(timeout=SECONDS)
    asyncio.run(until(lambda: known.left() == []))
    shutil.rmtree(folder)  # all that it leaves
