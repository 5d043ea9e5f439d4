"""The admin socket: a Unix socket that only this user can open, for calls that no network should bring.

It serves what the public port serves of pages and shards, over all tenants and without a key, and AdminService.
Who may open the file may do all: mode 0600 in a folder of mode 0700.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio

from cluster.auth import Gate
from cluster.endpoint import Caller, Door, service_handlers
from cluster.front import Front
from pagetable.errors import ConfigError
from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.memory.v1 import memory_pb2

MAX_PATH_BYTES = 100  # the kernel has room for 107
MAX_CALLS = 64
STOP_SECONDS = 1.0


def default_path(port: int) -> Path:
    """Where the service on `port` has its admin socket where nothing else is said."""
    home = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(home) / "quire" if home else Path("/tmp") / f"quire-{os.getuid()}"
    return folder / f"{port}.sock"


class _Admin:
    """The methods, by name."""

    def __init__(self, front: Front, stop: Callable[[], None], pid: int) -> None:
        self.GetPageMap, self.GetSequencePages = front.GetPageMap, front.GetSequencePages
        self.GetCluster, self.GetLoads = front.GetCluster, front.GetLoads
        self._stop, self._pid = stop, pid

    async def Stop(self, request: cluster_pb2.StopRequest, caller: Caller) -> cluster_pb2.StopResponse:
        self._stop()
        return cluster_pb2.StopResponse(pid=self._pid)


class AdminSocket:
    """Listens from `start` to `stop`.

    Args:
        path: of the socket; its folder is made where it is missing.
        stop: called when somebody asks for the service's end.
        pid: of the process that ends last; 0 where it is on another machine.
    """

    def __init__(self, path: str, front: Front, stop: Callable[[], None], pid: int = 0) -> None:
        self.path = Path(path)
        self._is_ours = False  # what lies there
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),), maximum_concurrent_rpcs=MAX_CALLS)
        door, admin = Door(Gate(None), MAX_CALLS), _Admin(front, stop, pid)
        for service in (
            memory_pb2.DESCRIPTOR.services_by_name["MemoryService"],
            cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"],
            cluster_pb2.DESCRIPTOR.services_by_name["AdminService"],
        ):
            self._server.add_generic_rpc_handlers((service_handlers(service, admin, door),))

    async def start(self) -> None:
        """Raises ConfigError where the path can't be a socket of this user's own, or somebody answers there."""
        _make_room(self.path)
        try:
            self._server.add_insecure_port(f"unix:{self.path}")
        except RuntimeError:
            raise ConfigError("admin_socket", str(self.path), "be a path where a socket can be made") from None
        self._is_ours = True
        os.chmod(self.path, 0o600)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(STOP_SECONDS)
        if self._is_ours:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _make_room(path: Path) -> None:
    if len(os.fsencode(path)) > MAX_PATH_BYTES or not path.is_absolute():
        raise ConfigError("admin_socket", str(path), f"be an absolute path of at most {MAX_PATH_BYTES} bytes")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.parent.lstat()
    except OSError as error:
        raise ConfigError("admin_socket", str(path), f"be in a folder of yours ({error.strerror})") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        limit = "be in a folder that only its owner, you, can enter (mode 0700)"
        raise ConfigError("admin_socket", str(path), limit, "choose another by --admin-socket")
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError("admin_socket", str(path), "be free or a socket that nobody serves any more")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()  # of a service that was killed
            return
    raise ConfigError("admin_socket", str(path), "be free: a service answers there", "stop it, or choose another")
