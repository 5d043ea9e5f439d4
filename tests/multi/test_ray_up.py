"""`launch/ray/local.yaml`: Ray takes it, and brings up a cluster with it on which `quire serve` answers."""

from __future__ import annotations

import re
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from tests.multi.netlab.host import Host
from tests.multi.netlab.job import Job, LabError
from tests.multi.netlab.lab import ROOT, Lab
from tests.serving import SECONDS

pytestmark = pytest.mark.timeout(900)
TEMPLATE = ROOT / "launch" / "ray" / "local.yaml"
WORDS = ("HEAD_IP", "WORKER_IP", "SSH_USER", "SSH_KEY", "TOKEN_FILE", "QUIRE_BIN", "NUM_DEVICES")
_V1 = {"RAY_UP_enable_autoscaler_v2": "0"}


def test_each_word_to_replace_is_documented_and_used() -> None:
    head, _, body = TEMPLATE.read_text().partition("cluster_name:")
    assert re.findall(r"^#   ([A-Z_]+)  ", head, re.MULTILINE) == list(WORDS)
    assert [word for word in WORDS if word not in body] == []
    filled = _fill(dict.fromkeys(WORDS, "1"))
    assert re.findall(r"\b[A-Z]+_[A-Z_]+\b", re.sub(r"\$?RAY_[A-Z_]+", "", filled)) == []


def test_ray_takes_the_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    words = {**dict.fromkeys(WORDS, "/nowhere"), "HEAD_IP": "10.0.0.1", "WORKER_IP": "10.0.0.2, 10.0.0.3"}
    config = yaml.safe_load(_fill({**words, "NUM_DEVICES": "1"}))
    prepared = prepare_config(config)
    validate_config(prepared)
    (kind,) = prepared["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"]) == (2, 2)  # all of them join, none is let go


def test_a_cluster_by_ray_up_serves_and_ends(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(3, "sshd", "ssh", "ssh-keygen", "rsync")
    head, worker, laptop = lab.hosts
    key, token = lab.folder / "key", lab.folder / "token"
    laptop.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    for host in (head, worker):
        _listen_for_ssh(lab, host, key)
    words = {
        "HEAD_IP": head.address,
        "WORKER_IP": worker.address,
        "SSH_USER": "root",
        "SSH_KEY": str(key),
        "TOKEN_FILE": str(token),
        "QUIRE_BIN": head.environment["PATH"].partition(":")[0],
        "NUM_DEVICES": "1",
    }
    config = lab.folder / "local.yaml"
    config.write_text(_fill(words))
    ray = laptop.python("-m", "ray.scripts.scripts")
    said = laptop.run([*ray, "up", "-y", str(config)], _V1)
    _until(lambda: worker.processes("raylet/raylet"), said)
    for host in (head, worker):
        assert (host.home / ".quire").stat().st_mode & 0o777 == 0o700
        assert (host.home / ".quire" / "ray-token").stat().st_mode & 0o777 == 0o600
    ask, proof = [*ray, "status", "--address", f"{head.address}:6379"], {"RAY_AUTH_MODE": "token"}
    assert "device" in laptop.run(ask, {**proof, "RAY_AUTH_TOKEN_PATH": str(token)})
    for stranger in ({}, {**proof, "RAY_AUTH_TOKEN": "0" * 64}):
        with pytest.raises(LabError, match="AuthenticationError"):
            laptop.run(ask, stranger)

    service = _serve(head)
    assert len(head.processes("-m worker")) == len(worker.processes("-m worker")) == 1
    quire = laptop.python("-m", "launch.cli")
    server = f"{head.address}:8461"
    told = laptop.run([*quire, "generate", "--server", server, "--prompt", "Once upon a time", "--max-tokens", "8"])
    assert "1 requests, 0 failed; 8 tokens" in told
    service.kill(signal.SIGTERM)
    assert service.wait() == 0, service

    ssh = ["ssh", "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    laptop.run([*ssh, f"root@{worker.address}", "bash --login -i -c 'ray stop'"])
    said = laptop.run([*ray, "down", "-y", str(config)])
    left = [pid for host in (head, worker) for name in ("raylet/raylet", "gcs_server") for pid in host.processes(name)]
    assert left == [], said


def _fill(words: Mapping[str, str]) -> str:
    """The file as a user has it who has replaced the words; comments stay as they are."""
    lines = TEMPLATE.read_text().splitlines()
    for word, value in words.items():
        pattern = rf"(?<![A-Z_]){word}(?![A-Z_])"
        lines = [line if line.startswith("#") else re.sub(pattern, value, line) for line in lines]
    return "\n".join(line for line in lines if not line.startswith("#"))


def _listen_for_ssh(lab: Lab, host: Host, key: Path) -> None:
    """An installed machine: sshd, and shells that find our packages, which need not be installed where tests run."""
    path = host.environment.get("PYTHONPATH", "")
    (host.home / ".bashrc").write_text(f"export PYTHONPATH={path}\n")
    (host.home / ".profile").write_text(". ~/.bashrc\n")  # as distributions have it
    host.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{host.home}/host-key"])
    options = [f"AuthorizedKeysFile={key}.pub", "StrictModes=no", "UsePAM=no", "PidFile=none", "PrintMotd=no"]
    words = [word for option in options for word in ("-o", option)]
    job = host.start(["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", f"{host.home}/host-key", *words])
    job.wait_line("listening on 0.0.0.0")


def _serve(head: Host) -> Job:
    """`quire serve` as somebody who has logged in there types it."""
    words = ["serve", "story", "--address", f"{head.address}:6379", "-dp", "2", "--threads", "1", "--insecure"]
    words += ["--host", head.address, "--num-gpu-blocks-override", "256"]
    shell = ["bash", "--login", "-i", "-c", f"exec python -P -m launch.cli {' '.join(words)}"]
    end = time.monotonic() + SECONDS
    while True:  # the other machine's raylet runs, but has perhaps not yet told what it has
        job = head.start(shell, {"PYTHONPATH": ""})
        try:
            job.wait_line("^ready on ")
            return job
        except LabError:
            if "data_parallel_size" not in str(job) or time.monotonic() > end:
                raise


def _until(holds: Callable[[], object], said: str) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, said
        time.sleep(0.2)
