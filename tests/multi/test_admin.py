"""The admin socket of a running service, `quire stop`, and what the public port does not do; with Ray and without."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cluster.processes import environment
from launch.client import Client
from launch.models.tiny_llama import make_tiny_llama
from quire_pb.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from tests.serving import SECONDS, Processes, is_alive

KEYS = {"red": "key-of-red", "blue": "key-of-blue"}
SMALL = ["--max-model-len", "1024", "--num-gpu-blocks-override", "512", "--threads", "1"]


def quire(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=SECONDS)


@dataclass
class Running:
    process: subprocess.Popen[str]
    port: int
    socket: Path
    keys: Path


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A service with keys."""
    make_tiny_llama(tmp_path / "tiny")
    keys = tmp_path / "keys"
    keys.write_text(
        "".join(f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n" for name, key in KEYS.items())
    )
    keys.chmod(0o600)
    command = [sys.executable, "-P", "-m", "launch.cli", "serve", str(tmp_path / "tiny"), "--no-ray", "--port", "0"]
    command += ["--api-keys", str(keys), *SMALL]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment())
    assert process.stdout is not None and process.stderr is not None
    ready = re.match(r"ready on 127.0.0.1:(\d+)", process.stdout.readline())
    assert ready is not None, process.communicate(timeout=SECONDS)
    found = None
    while found is None:
        found = re.search(r"admin socket (\S+); to end the service: quire stop --port (\d+)", process.stderr.readline())
    assert found[2] == ready[1]
    yield Running(process, int(ready[1]), Path(found[1]), keys)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)


def test_the_socket_is_this_users_alone_and_sees_all_tenants(running: Running) -> None:
    mode = running.socket.lstat().st_mode
    assert stat.S_ISSOCK(mode) and mode & 0o777 == 0o600
    assert running.socket.parent.stat().st_mode & 0o777 == 0o700
    server = f"127.0.0.1:{running.port}"
    with Client(server, api_key=KEYS["red"]) as red, Client(server, api_key=KEYS["blue"]) as blue:
        stream = red.stream({"prompt_token_ids": [9] * 40, "max_tokens": 900, "ignore_eos": True, "request_id": "mine"})
        next(output for output in stream if len(output.outputs[0].token_ids) > 5)
        assert blue.page_map().sequences == []
        with Client(f"unix:{running.socket}") as admin:
            assert [sequence.request_id for sequence in admin.page_map().sequences] == ["mine"]
            assert len(admin.cluster()) == 1
        stream.close()  # type: ignore[attr-defined]
    found = quire("status", "--admin-socket", str(running.socket))
    assert found.returncode == 0 and " ready " in found.stdout
    assert quire("status", "--server", server).returncode == 1  # without a key


def test_the_public_port_has_no_admin_calls(running: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        for metadata in ((), (("authorization", f"Bearer {KEYS['red']}"),)):
            with pytest.raises(grpc.RpcError) as found:
                cluster_pb2_grpc.AdminServiceStub(channel).Stop(cluster_pb2.StopRequest(), metadata=metadata)
            assert found.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert running.process.poll() is None


def test_stop_drains_and_waits_until_all_is_gone(running: Running) -> None:
    processes = Processes(running.process.pid)
    with Client(f"127.0.0.1:{running.port}", api_key=KEYS["red"]) as red:
        stream = red.stream({"prompt_token_ids": [9] * 40, "max_tokens": 600, "ignore_eos": True})
        next(output for output in stream if len(output.outputs[0].token_ids) > 5)
        stop = subprocess.Popen(
            [sys.executable, "-P", "-m", "launch.cli", "stop", "--port", str(running.port)], env=environment()
        )
        *_, last = stream
        assert len(last.outputs[0].token_ids) == 600 and last.outputs[0].finish_reason == "length"
    out, err = running.process.communicate(timeout=SECONDS)  # as its parent: without it a zombie would stay
    assert stop.wait(SECONDS) == 0
    assert (running.process.returncode, out) == (0, "")
    assert [line for line in err.splitlines() if not line.startswith("quire: ")] == []
    assert processes.left() == [] and not running.socket.exists()
    again = quire("stop", "--port", str(running.port))
    assert again.returncode == 2
    assert again.stderr == (
        f"quire: error: --admin-socket: got '{running.socket}', must be there: no service of yours has it; "
        "`quire serve` says its path\n"
    )


def test_a_socket_that_a_killed_service_left_is_taken_over_and_one_in_use_is_not(running: Running) -> None:
    tiny = str(running.keys.parent / "tiny")
    flags = ["--no-ray", "--port", "0", "--admin-socket", str(running.socket), *SMALL]
    refused = quire("serve", tiny, *flags)
    assert refused.returncode != 0 and "must be free: a service answers there" in refused.stderr
    assert quire("status", "--admin-socket", str(running.socket)).returncode == 0
    pids = [running.process.pid, *Processes(running.process.pid).look()]
    for pid in pids:  # the front, too, which would take its socket away
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    running.process.communicate(timeout=SECONDS)
    assert running.socket.exists()
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.cli", "serve", tiny, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert server.stdout is not None and server.stdout.readline().startswith("ready on ")
    stop = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.cli", "stop", "--admin-socket", str(running.socket)], env=environment()
    )
    server.communicate(timeout=SECONDS)
    assert stop.wait(SECONDS) == 0 and server.returncode == 0


def test_a_detached_service_under_ray_is_stopped_by_name(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "tiny")
    started = quire("serve", str(tmp_path / "tiny"), "--port", "0", "--detach", *SMALL)
    assert started.returncode == 0, started.stderr
    pid, port = re.findall(r"process (\d+); stop it with: quire stop --port (\d+)", started.stderr)[0]
    processes = Processes(int(pid))
    assert len(processes.known) > 3
    assert quire("status", "--server", f"127.0.0.1:{port}").returncode == 0
    assert quire("stop", "--port", port).returncode == 0
    assert not is_alive(int(pid)) and processes.left() == []
