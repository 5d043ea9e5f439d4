"""A front as a whole: its gRPC listener with health and reflection, its metrics, its connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import CancelledError as FutureCancelled

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from cluster.admin import AdminSocket
from cluster.auth import ApiKeys, Gate
from cluster.dispatch import Dispatcher
from cluster.endpoint import Door, service_handlers
from cluster.front import Front
from cluster.front_config import FrontConfig
from cluster.metrics import ClusterFigures, Meter
from cluster.metrics_server import MetricsServer
from pagetable.errors import ConfigError, QuireError
from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.inference.v1 import inference_pb2
from quire_pb.memory.v1 import memory_pb2
from quire_pb.worker.v1 import worker_pb2 as pb

MAX_MESSAGE_BYTES = 32 << 20
MAX_METADATA_BYTES = 16 << 10
MAX_CONNECTIONS = 1024
# Of all kinds, and of one connection: grpc's own refusals say neither why nor when to come back (its client makes an
# UNAVAILABLE of a stream beyond the limit), so they stand far behind FrontLimits.max_calls.
MAX_CALLS = 16_384
KEEPALIVE_MS = 10_000  # a client that is gone without a word is noticed after twice this
HANDSHAKE_MS = 10_000
POLL_SECONDS = 1.0
PAGE_MAP_SECONDS = 5.0  # no older page map in a scrape; no newer one is asked for
SCRAPE_SECONDS = 3.0
STOP_SECONDS = 1.0
_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    memory_pb2.DESCRIPTOR.services_by_name["MemoryService"],
    cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"],
)
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS),
    ("grpc.server.max_pending_requests", MAX_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_CALLS),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),  # else a second server would share the port in silence
)


class FrontServer:
    """Listens. `start`, perhaps `drain`, `stop`; in one event loop.

    Raises:
        ConfigError: where the settings would listen openly, or keys or a tokenizer can't be read (ModelError).
    """

    def __init__(self, config: FrontConfig, stop: Callable[[], None] = lambda: None) -> None:
        """`stop` is called when somebody asks for the service's end on the admin socket."""
        self.config = config
        keys = ApiKeys.from_file(config.api_keys) if config.api_keys is not None else None
        gate, registry = Gate(keys), CollectorRegistry()
        vllm = config.metrics_compat == "vllm"
        self._meter = Meter(registry, config.model, vllm)
        self._figures = ClusterFigures(registry, config.model if vllm else None)
        self._changed = asyncio.Event()
        name = f"front-{os.getpid()}"
        self.dispatcher = Dispatcher(
            config.scheduler, config.secret, name, config.limits, self._changed.set, self._meter.failed_over
        )
        self.front = Front(config, self.dispatcher, self._meter, keyed=keys is not None)
        self._health = health.aio.HealthServicer()
        self._metrics = MetricsServer(registry, self._refresh)
        self._map_taken = -PAGE_MAP_SECONDS
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._server = self._make_server(gate)
        path = config.admin_socket
        self._admin = AdminSocket(path, self.front, stop, config.service_pid) if path is not None else None

    async def start(self) -> tuple[int, int]:
        """Listen; (port, metrics port). Raises ConfigError where a port is taken."""
        port = self._bind()
        if self._admin is not None:
            await self._admin.start()
        metrics_port = self._metrics.start(self.config.metrics_host, self.config.metrics_port)
        await self._set_health(False)
        self.dispatcher.begin()
        await self._server.start()
        self._tasks = [
            asyncio.create_task(self._watch_health(), name="health"),
            asyncio.create_task(self._poll(), name="loads"),
        ]
        return port, metrics_port

    async def drain(self, seconds: float) -> bool:
        """NOT_SERVING and no new work; whether all that ran had ended after `seconds`."""
        await self._health.enter_graceful_shutdown()
        return await self.front.drain(seconds)

    async def stop(self) -> None:
        """End what runs, and everything else."""
        await self._server.stop(STOP_SECONDS)
        if self._admin is not None:
            await self._admin.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.dispatcher.end()
        await asyncio.to_thread(self._metrics.stop)
        self.front.close()

    def _make_server(self, gate: Gate) -> grpc.aio.Server:
        server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        door = Door(gate, self.config.limits.max_calls)
        for service in _SERVICES:
            server.add_generic_rpc_handlers((service_handlers(service, self.front, door),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.full_name for service in _SERVICES]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        return server

    def _bind(self) -> int:
        config = self.config
        host = f"[{config.host}]" if ":" in config.host and not config.host.startswith("[") else config.host
        address = f"{host}:{config.port}"
        try:
            if config.tls is None:
                return self._server.add_insecure_port(address)
            ca = config.tls.read("client_ca")
            pair = config.tls.read("key") or b"", config.tls.read("cert") or b""
            credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError:
            if config.tls is not None and _is_free(config.host, config.port):
                raise ConfigError("tls", config.tls.cert, "be a PEM certificate, with its key in tls.key") from None
            limit = f"be free on {config.host}, an address of this machine"
            raise ConfigError("port", config.port, limit, "choose another, or 0 for any free one") from None

    # Health

    async def _watch_health(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._set_health(self.dispatcher.shards.is_ready)

    async def _set_health(self, is_ready: bool) -> None:
        kinds = health_pb2.HealthCheckResponse
        status = kinds.SERVING if is_ready else kinds.NOT_SERVING
        for name in ("", *(service.full_name for service in _SERVICES)):
            await self._health.set(name, status)

    # Metrics

    async def _poll(self) -> None:
        while True:
            with contextlib.suppress(QuireError):
                await self._ask_loads()
            await asyncio.sleep(POLL_SECONDS)

    async def _ask_loads(self) -> None:
        try:
            body = await self.dispatcher.scheduler.query(pb.Query(loads=True), SCRAPE_SECONDS)
        except QuireError:
            self._figures.lose_scheduler()
            raise
        loads = cluster_pb2.GetLoadsResponse.FromString(body).loads
        self._figures.take_loads(self.dispatcher.shards.infos, loads, self._loop.time())

    def _refresh(self) -> None:
        """On a scrape's thread: fetch what is not polled. Where the loop or the scheduler is late, it goes without."""
        asked = asyncio.run_coroutine_threadsafe(self._ask_page_map(), self._loop)
        try:
            body = asked.result(SCRAPE_SECONDS)
        except (QuireError, TimeoutError, FutureCancelled):
            asked.cancel()
            return
        if body is not None:
            self._figures.take_page_map(memory_pb2.GetPageMapResponse.FromString(body))

    async def _ask_page_map(self) -> bytes | None:
        self._figures.take_slots(self.front.slots())
        now = self._loop.time()
        if now - self._map_taken < PAGE_MAP_SECONDS:
            return None
        self._map_taken = now
        return await self.dispatcher.scheduler.query(pb.Query(page_map=True), SCRAPE_SECONDS)


def _is_free(host: str, port: int) -> bool:
    """Whether a port can be listened on: grpc says of both a taken port and a bad certificate only that it failed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
            probe.listen(1)
        except OSError:
            return False
    return True
