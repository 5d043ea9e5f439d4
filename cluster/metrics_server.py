"""GET /metrics on a port and threads of its own: a busy event loop answers late, never not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import make_wsgi_app

from pagetable.errors import ConfigError

REQUEST_SECONDS = 10.0
MAX_CONNECTIONS = 16


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody hung up."""


class MetricsServer:
    """Serves a registry.

    Args:
        refresh: called on the scrape's thread before the registry is read.
    """

    def __init__(self, registry: CollectorRegistry, refresh: Callable[[], None]) -> None:
        self._app, self._refresh = make_wsgi_app(registry), refresh
        self._server: WSGIServer | None = None

    def start(self, host: str, port: int) -> int:
        """Listen; the port. Raises ConfigError where it is taken."""
        try:
            self._server = make_server(host, port, self._answer, _Server, _Handler)
        except OSError as error:
            limit = f"be free on {host} ({(error.strerror or 'it cannot be bound').lower()})"
            raise ConfigError("metrics_port", port, limit, "choose another, or 0 for any free one") from None
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        return int(self._server.server_port)

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ.get("REQUEST_METHOD") != "GET":
            return _refuse(start_response, "405 Method Not Allowed", [("Allow", "GET")])
        if environ.get("PATH_INFO") != "/metrics":
            return _refuse(start_response, "404 Not Found", [])
        self._refresh()
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer


def _refuse(start_response: Any, status: str, headers: list[tuple[str, str]]) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain"), *headers])
    return [f"{status[4:]}: GET /metrics is all there is\n".encode()]
