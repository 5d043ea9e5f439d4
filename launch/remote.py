"""The commands that talk to a running service: `--server`, `quire status`, `quire pages`, `quire devices`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pagetable.errors import ConfigError

if TYPE_CHECKING:
    from launch.client import Client

_CONDITIONS = {1: "ready", 2: "draining", 3: "dead"}
_POLL_SECONDS = 0.05
_RUN = 3  # so many consecutive blocks are written as a range


def add_server_flags(command: argparse.ArgumentParser, required: bool) -> None:
    """Where the service is and how to be let in."""
    group = command.add_argument_group("service")
    default = "127.0.0.1:8461" if required else None
    text = f"default: {default}" if required else "run on this service, not in this process"
    group.add_argument("--server", metavar="HOST:PORT", default=default, help=text)
    group.add_argument("--api-key-file", metavar="FILE", help="holds the key; never given on the command line")
    group.add_argument("--tls-ca", metavar="FILE", help="turns TLS on: the authority of the server's certificate, PEM")
    group.add_argument("--tls-client-cert", metavar="FILE", help="certificate to show, PEM")
    group.add_argument("--tls-client-key", metavar="FILE", help="its private key, PEM")


def open_client(found: argparse.Namespace) -> Client:
    """Raises ConfigError where a file cannot be read."""
    from launch.client import connect

    if getattr(found, "admin_socket", None) is not None:
        return connect(_socket_name(found.admin_socket))
    key = None
    try:
        if found.api_key_file is not None:
            with open(found.api_key_file, encoding="utf-8") as file:
                key = file.read().strip()
        return connect(
            found.server,
            api_key=key,
            tls_ca=found.tls_ca,
            tls_cert=found.tls_client_cert,
            tls_key=found.tls_client_key,
        )
    except OSError as error:
        raise ConfigError("--api-key-file/--tls-*", error.filename, f"be a readable file ({error.strerror})") from None


def status(found: argparse.Namespace) -> int:
    """What each shard is and does."""
    with open_client(found) as client:
        shards, loads = client.cluster(), {load.shard_id: load for load in client.loads()}
    columns = " ".join(f"{name:>7}" for name in ("running", "waiting", "used", "cached", "free"))
    print(f"{'shard':>5} {'condition':<9} {'model':<16} {columns}")
    for shard in shards:
        load = loads.get(shard.shard_id)
        counts = (
            (load.running, load.waiting, load.used_blocks, load.cached_blocks, load.free_blocks) if load else ("-",) * 5
        )
        numbers = " ".join(f"{count:>7}" for count in counts)
        print(f"{shard.shard_id:>5} {_CONDITIONS.get(shard.condition, '?'):<9} {shard.model:<16.16} {numbers}")
    return 0 if any(shard.condition == 1 for shard in shards) else 1


def devices(found: argparse.Namespace) -> int:
    """Each pool of blocks."""
    with open_client(found) as client:
        pools = client.page_map().devices
    print(f"{'device':>6} {'shard':>5} {'blocks':>8} {'tokens':>9} {'used':>8} {'cached':>8} {'free':>8}")
    for pool in pools:
        print(
            f"{pool.device_id:>6} {pool.shard_id:>5} {pool.num_blocks:>8} {pool.num_blocks * pool.block_size:>9}"
            f" {pool.used_blocks:>8} {pool.cached_blocks:>8} {pool.free_blocks:>8}"
        )
    return 0


def pages(found: argparse.Namespace) -> int:
    """Every running sequence's table, or one request's."""
    with open_client(found) as client:
        if found.request_id is not None:
            print("\n".join(page_lines(client.sequence_pages(found.request_id), {})))
            return 0
        page_map = client.page_map()
    users = {(shared.page.device_id, shared.page.block_id): shared.users for shared in page_map.shared_pages}
    lines = page_lines(page_map.sequences, users)
    print("\n".join(lines) if lines else "no sequence runs")
    saved = sum(count - 1 for count in users.values())
    if saved:
        print(f"{len(users)} pages are shared (*): {saved} pages saved")
    return 0


def stop(found: argparse.Namespace) -> int:
    """End a service and wait until it is gone."""
    from cluster.admin import default_path
    from launch.client import connect

    path = found.admin_socket or str(default_path(found.port))
    with connect(_socket_name(path)) as client:
        pid = client.stop_service()
    while pid and _runs(pid):
        time.sleep(_POLL_SECONDS)
    return 0


def _socket_name(path: str) -> str:
    """As gRPC writes it. Raises ConfigError where no service of this user listens."""
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise ConfigError("--admin-socket", path, "be there: no service of yours has it", "`quire serve` says its path")
    return f"unix:{path}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the number is somebody else's by now
        return False
    return True


def page_lines(sequences: Sequence[Any], users: dict[tuple[int, int], int]) -> list[str]:
    """A line for each sequence: its pages as (device_id, block_id), runs as ranges, shared ones with a star."""
    lines = []
    for sequence in sequences:
        name = f"{sequence.request_id}[{sequence.index}]"
        entries = [(page.device_id, page.block_id) for page in sequence.pages]
        text = " ".join(_ranges(entries, users)) or "waits for blocks"
        lines.append(f"{name}: {len(entries)} pages: {text}")
    return lines


def _ranges(entries: Sequence[tuple[int, int]], users: dict[tuple[int, int], int]) -> Iterator[str]:
    start = 0
    while start < len(entries):
        device, block = entries[start]
        star = entries[start] in users
        end = start + 1
        while end < len(entries) and entries[end] == (device, block + end - start) and (entries[end] in users) == star:
            end += 1
        mark = "*" if star else ""
        if end - start >= _RUN:
            yield f"({device}, {block}..{block + end - start - 1}){mark}"
        else:
            yield from (f"({device}, {block + i}){mark}" for i in range(end - start))
        start = end
