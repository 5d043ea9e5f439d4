"""Ray on pretend hosts: one cluster with a token, and Quire's command on it."""

from __future__ import annotations

import secrets

from tests.multi.netlab.host import Host
from tests.multi.netlab.job import Job
from tests.multi.netlab.lab import Lab

PORT = 6379
_FLAGS = ["--disable-usage-stats", "--num-cpus", "2", "--object-store-memory", str(80 << 20)]


class RayHosts:
    """A Ray cluster on hosts of a lab. The head is `lab.hosts[0]`; it goes on until the lab is closed.

    Attributes:
        address: of the head, as `--address` wants it.
        environment: that every command of Ray and Quire needs on any host.
    """

    def __init__(self, lab: Lab) -> None:
        self.head = lab.hosts[0]
        self.address = f"{self.head.address}:{PORT}"
        token = lab.folder / "ray-token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_worker_niceness": "0",
            # as in launch/ray/local.yaml: with Ray's own it takes a minute to find that a host has gone
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "5",
        }

    def start_head(self, devices: int) -> None:
        self._start(self.head, "--head", "--port", str(PORT), "--include-dashboard", "false", devices=devices)

    def join(self, host: Host, devices: int) -> None:
        self._start(host, "--address", self.address, devices=devices)

    def serve(self, *words: str) -> Job:
        """`quire serve` on the head, on this cluster."""
        command = self.head.python("-m", "launch.cli", "serve", "--address", self.address, *words)
        return self.head.start(command, self.environment)

    def _start(self, host: Host, *words: str, devices: int) -> None:
        command = [*host.python("-m", "ray.scripts.scripts", "start"), *words, *_FLAGS]
        host.run([*command, "--resources", f'{{"device": {devices}}}'], self.environment)
