"""What a front is told at its start, checked before anything listens."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pagetable.errors import ConfigError

METRIC_NAMES = ("vllm",)


@dataclass(frozen=True, slots=True)
class FrontLimits:
    """Bounds of one front. Seconds and bytes.

    Attributes:
        max_requests: that generate, at once; one more is told to try again.
        max_calls: of all kinds, in progress at once; one more is told so before it is read.
        max_preparing_bytes: of requests that are being tokenized or wait for it.
        max_unsent_bytes: that wait for one client that does not read.
        write_seconds: how long a client may leave one message unread.
        place_seconds: how long a request waits for the scheduler, or for a shard after its own has died.
        no_shard_seconds: how long a new request waits where the scheduler knows of no shard that is ready.
        max_deaths: shards that may die under a request that made progress on each of them.
    """

    max_requests: int = 1024
    max_calls: int = 2048
    max_preparing_bytes: int = 256 << 20
    max_unsent_bytes: int = 1 << 20
    write_seconds: float = 30.0
    place_seconds: float = 10.0
    no_shard_seconds: float = 0.8
    max_deaths: int = 4
    text_threads: int = 2

    def __post_init__(self) -> None:
        for each in fields(self):
            value: Any = getattr(self, each.name)
            kinds = (int,) if each.type == "int" else (int, float)
            if type(value) not in kinds or not 0 < value < float("inf"):
                raise ConfigError(f"limits.{each.name}", value, "be a number above 0")


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files: the server's chain and key; with `client_ca` only clients with a certificate of it may connect."""

    cert: str
    key: str
    client_ca: str | None = None

    def read(self, name: str) -> bytes | None:
        path = getattr(self, name)
        if path is None:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"tls.{name}", path, f"be a file that can be read ({type(error).__name__})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontConfig:
    """A front's settings.

    Attributes:
        secret: the cluster's.
        scheduler: host:port.
        folder: of the model; its tokenizer and chat template are read.
        model: the name that users see.
        port, metrics_port: 0 is any free port.
        api_keys: file of keys; None lets everybody in.
        insecure: an open listener without keys and TLS is wanted.
        seed: from it, requests that bring no seed get theirs in the order of their arrival; None draws each.
        metrics_compat: "vllm" adds vLLM's names.
        drain_seconds: how long running streams may go on after the end has begun.
        admin_socket: absolute path of a Unix socket for this user's own calls; None has none.
        service_pid: of the process that started the service, where it is on this machine.
    """

    host: str = "127.0.0.1"
    port: int = 0
    scheduler: str
    secret: bytes = field(repr=False)
    folder: str
    model: str
    api_keys: str | None = None
    tls: Tls | None = None
    insecure: bool = False
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    metrics_compat: str | None = None
    seed: int | None = None
    drain_seconds: float = 30.0
    admin_socket: str | None = None
    service_pid: int = 0
    limits: FrontLimits = FrontLimits()

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= 65535:
                raise ConfigError(name, value, "be a port from 0 to 65535", "0 takes any free one")
        if self.port and self.port == self.metrics_port:
            raise ConfigError("metrics_port", self.metrics_port, "differ from port")
        if self.metrics_compat is not None and self.metrics_compat not in METRIC_NAMES:
            raise ConfigError("metrics_compat", self.metrics_compat, f"be one of {', '.join(METRIC_NAMES)}")
        if not 0 <= self.drain_seconds <= 86400:
            raise ConfigError("drain_seconds", self.drain_seconds, "be from 0 to 86400")
        if not is_loopback(self.host) and not self.insecure and (self.api_keys is None or self.tls is None):
            missing = [name for name in ("api_keys", "tls") if getattr(self, name) is None]
            limit = "be a loopback address while anyone who reaches it could use the service"
            raise ConfigError("host", self.host, limit, f"give {' and '.join(missing)}, or say insecure")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> FrontConfig:
        """From a process's settings. Raises ConfigError, also for a setting that there is not."""
        names = {each.name for each in fields(cls)}
        for name in settings:
            if name not in names:
                raise ConfigError(name, settings[name], "not be given: there is no such setting")
        values = dict(settings)
        try:
            values["secret"] = bytes.fromhex(values["secret"])
            values["limits"] = FrontLimits(**(values.get("limits") or {}))
            values["tls"] = Tls(**values["tls"]) if values.get("tls") else None
            return cls(**values)
        except (TypeError, ValueError, KeyError) as error:
            # a value could be the secret: only the kind of fault
            raise ConfigError("settings", type(error).__name__, "be those of a front") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
