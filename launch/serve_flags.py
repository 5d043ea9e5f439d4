"""The flags of `quire serve` beside the engine's, and which of them may stand together."""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat
from pathlib import Path

from cluster.front_config import METRIC_NAMES, is_loopback
from launch.flags import Parser
from pagetable.errors import ConfigError

DEFAULT_PORT = 8461
LASTING_PORTS = range(20000, 32768)  # Ray's workers have those below, outgoing connections most often those above
_ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Where and how a service listens and ends. Checked here; nothing is opened yet.

    Attributes:
        port: 0 is any free port.
        metrics_port: None is the port after `port`; 0 is any free port.
        address: of a running Ray cluster to join; None starts one on this machine.
        ray: False starts the processes without Ray.
        admin_socket: path of the Unix socket for `quire stop` and its like; None takes one by the port.
        drain_seconds: how long running streams may go on after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    metrics_port: int | None = None
    metrics_compat: str | None = None
    address: str | None = None
    ray: bool = True
    detach: bool = False
    api_keys: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    insecure: bool = False
    admin_socket: str | None = None
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, port in (("--port", self.port), ("--metrics-port", self.metrics_port)):
            if port is not None and not 0 <= port <= 65535:
                raise ConfigError(name, port, "be a port from 0 to 65535", "0 takes any free one")
        if self.metrics_port and self.metrics_port == self.port:
            raise ConfigError("--metrics-port", self.metrics_port, "differ from --port")
        if not 0 <= self.drain_seconds <= 86400:
            raise ConfigError("--drain-seconds", self.drain_seconds, "be from 0 to 86400")
        if self.metrics_compat is not None and self.metrics_compat not in METRIC_NAMES:
            raise ConfigError("--metrics-compat", self.metrics_compat, f"be one of {', '.join(METRIC_NAMES)}")
        if not self.ray and self.address is not None:
            raise ConfigError("--address", self.address, "stand without --no-ray", "drop one of the two")
        if self.address not in (None, "auto") and not _ADDRESS.fullmatch(str(self.address)):
            raise ConfigError("--address", self.address, "be HOST:PORT or auto", "`ray status` names it")
        self._check_files()
        if not (is_loopback(self.host) or self.insecure):
            missing = [] if self.api_keys else ["--api-keys FILE"]
            missing += [] if self.tls_cert else ["--tls-cert FILE --tls-key FILE"]
            if missing:
                raise ConfigError(
                    "--host",
                    self.host,
                    "be a loopback address while anyone who reaches it could use the service",
                    f"add {' and '.join(missing)}, or say --insecure",
                )

    def _check_files(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, other = ("--tls-cert", "--tls-key") if self.tls_key is None else ("--tls-key", "--tls-cert")
            raise ConfigError(given, self.tls_cert or self.tls_key, f"stand with {other}")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("--tls-client-ca", self.tls_client_ca, "stand with --tls-cert and --tls-key")
        for name in ("api_keys", "tls_cert", "tls_key", "tls_client_ca"):
            path = getattr(self, name)
            if path is not None and not (os.path.isfile(path) and os.access(path, os.R_OK)):
                raise ConfigError("--" + name.replace("_", "-"), path, "be a file that can be read")

    @property
    def tls(self) -> dict[str, str | None] | None:
        """As the front's settings want it."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        paths = {"cert": self.tls_cert, "key": self.tls_key, "client_ca": self.tls_client_ca}
        return {name: path and os.path.abspath(path) for name, path in paths.items()}


def add_serve_flags(parser: Parser) -> None:
    group = parser.add_argument_group("service")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    group.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"of gRPC; default: {DEFAULT_PORT}")
    group.add_argument("--metrics-port", type=int, metavar="PORT", help="of /metrics; default: the one after --port")
    group.add_argument("--metrics-compat", metavar="vllm", help="add metrics under these names, too")
    group.add_argument("--address", metavar="HOST:PORT", help="a running Ray cluster; default: start one here")
    group.add_argument("--no-ray", dest="ray", action="store_false", help="start the processes without Ray")
    group.add_argument("--detach", action="store_true", help="return once it is ready; it runs on")
    group.add_argument("--api-keys", metavar="FILE", help="who may come in: keys and their tenants")
    group.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    group.add_argument("--tls-key", metavar="FILE", help="its private key, PEM")
    group.add_argument("--tls-client-ca", metavar="FILE", help="clients must have a certificate of this authority")
    group.add_argument("--insecure", action="store_true", help="allow an open listener without keys and TLS")
    group.add_argument("--admin-socket", metavar="PATH", help="Unix socket for this user; default: one by the port")
    group.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="how long running streams may go on after SIGTERM; default: 30",
    )


def read_serve(found: argparse.Namespace) -> ServeConfig:
    """Raises ConfigError with the flag, the value, the limit and the cure."""
    names = ServeConfig.__dataclass_fields__
    return ServeConfig(**{name: getattr(found, name) for name in names})


def choose_port(flag: str, host: str, port: int) -> int:
    """`port`, or any free one for 0. ConfigError where it can't be listened on.

    Who is told to listen there may start seconds later, and again: so a free one is none that the kernel gives to
    outgoing connections, and no two calls of a process find the same.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in _lasting_ports() if port == 0 else [port]:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), candidate))
                probe.listen(1)
            except socket.gaierror:
                raise ConfigError("--host", host, "be an address of this machine") from None
            except OSError as error:
                if error.errno == errno.EADDRINUSE and candidate != port:
                    continue
                limit = f"be free on {host} ({(error.strerror or 'it cannot be bound').lower()})"
                raise ConfigError(flag, port, limit, "choose another, or 0 for any free one") from None
            return int(probe.getsockname()[1])
    raise AssertionError("the last candidate is the kernel's choice")


@cache
def _lasting_ports() -> Iterator[int]:
    """Each of LASTING_PORTS once, in any order, but for those of outgoing connections; then 0, the kernel's choice."""
    try:
        outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        outgoing = LASTING_PORTS.stop
    ports = [port for port in LASTING_PORTS if port < outgoing]
    return chain(random.sample(ports, len(ports)), repeat(0))
