"""What `quire serve` refuses before it starts anything, each with the flag, the value, the limit and the cure."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.service import MAX_DEATHS, Breaker, describe_event, failure
from launch.memory import step_limit
from launch.serve_flags import LASTING_PORTS, ServeConfig, choose_port
from pagetable.errors import ConfigError, ModelError, RequestFailed
from worker.config import ShardConfig
from worker.fields import Fields
from worker.model_config import ModelConfig
from worker.rope import RopeConfig


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"port": 65536}, "--port: got 65536, must be a port from 0 to 65535; 0 takes any free one"),
        ({"port": -1}, "--port: got -1, must be a port from 0 to 65535; 0 takes any free one"),
        ({"metrics_port": 70000}, "--metrics-port: got 70000, must be a port from 0 to 65535; 0 takes any free one"),
        ({"port": 9000, "metrics_port": 9000}, "--metrics-port: got 9000, must differ from --port"),
        ({"drain_seconds": float("nan")}, "--drain-seconds: got nan, must be from 0 to 86400"),
        ({"drain_seconds": -1.0}, "--drain-seconds: got -1.0, must be from 0 to 86400"),
        ({"metrics_compat": "x"}, "--metrics-compat: got 'x', must be one of vllm"),
        ({"ray": False, "address": "h:1"}, "--address: got 'h:1', must stand without --no-ray; drop one of the two"),
        ({"address": "ray://h:1"}, "--address: got 'ray://h:1', must be HOST:PORT or auto; `ray status` names it"),
        ({"address": "host"}, "--address: got 'host', must be HOST:PORT or auto; `ray status` names it"),
        ({"tls_cert": "c"}, "--tls-cert: got 'c', must stand with --tls-key"),
        ({"tls_key": "k"}, "--tls-key: got 'k', must stand with --tls-cert"),
        ({"tls_client_ca": "a"}, "--tls-client-ca: got 'a', must stand with --tls-cert and --tls-key"),
        ({"api_keys": "/nowhere/keys"}, "--api-keys: got '/nowhere/keys', must be a file that can be read"),
        (
            {"host": "0.0.0.0"},
            "--host: got '0.0.0.0', must be a loopback address while anyone who reaches it could use the service; "
            "add --api-keys FILE and --tls-cert FILE --tls-key FILE, or say --insecure",
        ),
    ],
)
def test_what_may_not_stand_together(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(**fields)
    assert str(caught.value) == line


def test_an_open_listener_needs_both_keys_and_tls(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    tls, keys = {"tls_cert": str(file), "tls_key": str(file)}, {"api_keys": str(file)}
    with pytest.raises(ConfigError, match=r"; add --tls-cert FILE --tls-key FILE, or say --insecure$"):
        ServeConfig(host="::", **keys)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"; add --api-keys FILE, or say --insecure$"):
        ServeConfig(host="::", **tls)  # type: ignore[arg-type]
    assert ServeConfig(host="::", **tls, **keys).tls == {"cert": str(file), "key": str(file), "client_ca": None}  # type: ignore[arg-type]
    assert ServeConfig(host="0.0.0.0", insecure=True).tls is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_port_in_use_is_refused_and_zero_finds_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            choose_port("--port", "127.0.0.1", port)
        limit = "must be free on 127.0.0.1 (address already in use)"
        assert str(caught.value) == f"--port: got {port}, {limit}; choose another, or 0 for any free one"
    found = {choose_port("--port", "127.0.0.1", 0) for _ in range(50)}
    assert len(found) == 50
    outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if outgoing > LASTING_PORTS.start + 100:
        assert found <= set(LASTING_PORTS) and max(found) < outgoing
    with pytest.raises(ConfigError, match=r"^--host: got 'no such host', must be an address of this machine$"):
        choose_port("--port", "no such host", 0)


def test_the_breaker_counts_deaths_of_a_minute() -> None:
    clock = [0.0]
    breaker = Breaker(lambda: clock[0])
    for second in range(MAX_DEATHS - 1):
        clock[0] = float(second)
        assert not breaker.trips()
    clock[0] = 60.0  # the first was a minute ago
    assert not breaker.trips()
    clock[0] = 60.5
    assert breaker.trips()


def test_what_processes_say_becomes_errors_and_lines_for_people() -> None:
    assert isinstance(failure({"code": "FAILED_PRECONDITION", "message": "m"}), ModelError)
    assert isinstance(failure({"code": "UNAVAILABLE", "message": "m"}), RequestFailed)
    died = {"died": {"shard_id": 2, "epoch": 5, "status": 1}}
    assert describe_event(died) == "the worker of shard 2 ended with status 1; its requests go on elsewhere"
    assert describe_event({"down": {"shard_id": 2, "message": "text"}}) == "text"
    assert describe_event({"ready": {}}) is None


_REAP = """
import subprocess, sys
from cluster.reaper import Reaper

code = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid, flush=True); input()"
parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
orphan = int(parent.stdout.readline())
reaper = Reaper()
reaper.look()
assert reaper.left() == sorted([parent.pid, orphan]), reaper.left()
assert not reaper.has_lost("sleep")
late = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # never seen, so never touched
parent.communicate("\\n")
assert reaper.left() == [orphan]
assert reaper.reap(0.1) == [orphan]
assert reaper.reap(30.0) == []
assert reaper.has_lost("sleep") and not reaper.has_lost("late")
assert late.poll() is None
late.communicate(b"\\n")
print("reaped")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_reaper_ends_what_was_below_it_and_nothing_else() -> None:
    # in a process of its own: whatever hangs below the test's own process is not its business
    done = subprocess.run([sys.executable, "-c", _REAP], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "reaped\n"), done.stderr


def test_a_step_may_take_as_long_as_the_models_largest_on_slow_cores() -> None:
    model = ModelConfig(
        architecture="x",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_layers=4,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        max_position_embeddings=1 << 20,
        rms_norm_eps=1e-6,
        rope=RopeConfig.from_fields(Fields({"rope_theta": 1e4}, "config.json")),
        windows=(0,) * 4,
    )
    short = ShardConfig(num_blocks=1 << 16, max_model_len=1 << 10, max_num_batched_tokens=1 << 10)
    assert step_limit(model, short, 1) == 10.0
    long = dataclasses.replace(short, max_model_len=1 << 20)
    layer = 64 * (4 * 64 + 3 * 64) + 2 * 64
    weights = 2 * 100 * 64 + 4 * layer + 64
    assert step_limit(model, long, 2) == 1024 * (2 * weights + 4 * 4 * 64 * (1 << 20)) / 4e10 > 10.0
