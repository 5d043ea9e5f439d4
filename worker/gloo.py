"""Process groups between hosts, by torch.distributed's gloo: the same two shapes that shared memory has, over sockets.

A process group belongs to one epoch and never gets over an error. gloo itself cannot be told to stop (`abort` does
nothing, `destroy_process_group` leaves a stuck call stuck), so its sockets are shut: duplicates of them are taken when
the group has formed, because numbers of closed ones are soon somebody else's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from kernels.peers import CallbackPeers, PeersBroken

TIMEOUT = timedelta(minutes=10)  # of a collective; the control connections find a dead or frozen rank long before
FORM_TIMEOUT = timedelta(seconds=10)  # all ranks have said that they are ready, so all come at once
_SIOCGIFADDR = 0x8915


class Store:
    """Where the ranks of one epoch meet; lives with the leader."""

    def __init__(self, host: str) -> None:
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=FORM_TIMEOUT)
        self.address = f"{host}:{self._store.port}"


class World:
    """All ranks of a shard for one epoch. A process has one at a time.

    `form`, then `group` as often as needed, then `seal`. `abort` may be called from any thread at any time, also while
    another one is in one of these.
    """

    def __init__(self) -> None:
        self._known = set(_sockets())
        self._held: list[socket.socket] = []
        self._gathers: list[_Gather] = []
        self._lock = threading.RLock()  # a signal's handler that aborts may interrupt who holds it
        self._is_over = self._is_sealed = False

    def form(self, store: str, epoch: int, rank: int, size: int, own_host: str) -> None:
        """Meet the others. Raises RuntimeError or OSError (torch's words) where not all come in time."""
        interface = interface_of(own_host)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        host, _, port = store.rpartition(":")
        meeting = TCPStore(host, int(port), is_master=False, timeout=FORM_TIMEOUT)
        self._hold()
        store_of_epoch = PrefixStore(f"epoch{epoch}", meeting)
        dist.init_process_group("gloo", store=store_of_epoch, rank=rank, world_size=size, timeout=FORM_TIMEOUT)
        self._formed(None, TIMEOUT)

    def group(self, ranks: Sequence[int], timeout: timedelta = TIMEOUT) -> dist.ProcessGroup | None:
        """A group of some ranks; every rank of the world must ask for the same ones in the same order.

        Args:
            timeout: of a collective in it.

        Returns:
            None where this rank is not in it.

        Raises:
            RuntimeError: the epoch is over, or not all came.
        """
        found = dist.new_group(list(ranks), timeout=FORM_TIMEOUT)
        if not isinstance(found, dist.ProcessGroup):
            self._hold()
            return None
        self._formed(found, timeout)
        return found

    def peers(self, group: dist.ProcessGroup, rank: int, size: int, capacity: int) -> CallbackPeers:
        """An exchange over one of its groups.

        Args:
            rank: within the group.
            capacity: bytes of a region.
        """
        self._gathers.append(_Gather(group))
        return CallbackPeers(rank, size, capacity, self._gathers[-1])

    def seal(self) -> None:
        """There will be no further group: sockets that this process opens from now on are none of this world's."""
        self._hold()
        self._is_sealed = True

    def abort(self) -> None:
        """Whoever waits in a collective of this world, here or elsewhere, is told at once. From any thread."""
        with self._lock:
            if not self._is_over and not self._is_sealed:
                self._hold_new()
            self._is_over = True
            for each in self._held:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave. No thread may be in a collective."""
        self.abort()
        with self._lock:
            for each in self._held:
                each.close()
            self._held.clear()
        for gather in self._gathers:
            gather.group = None
        if dist.is_initialized():
            with contextlib.suppress(Exception):  # of a group that is broken already
                dist.destroy_process_group()

    def _formed(self, group: dist.ProcessGroup | None, timeout: timedelta) -> None:
        _set_pg_timeout(timeout, group)
        self._hold()

    def _hold(self) -> None:
        with self._lock:
            if self._is_over:
                raise RuntimeError("the epoch is over")
            self._hold_new()

    def _hold_new(self) -> None:
        for name, number in _sockets().items():
            if name in self._known:
                continue
            self._known.add(name)
            with contextlib.suppress(OSError):
                copy = socket.socket(fileno=os.dup(number))
                if copy.family in (socket.AF_INET, socket.AF_INET6) and not _listens(copy):
                    self._held.append(copy)
                else:
                    copy.close()


class _Gather:
    """Of a CallbackPeers, which refers to itself: its group must not wait until that is found."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group: dist.ProcessGroup | None = group

    def __call__(self, regions: list[torch.Tensor], own: int) -> None:
        if self.group is None:
            raise PeersBroken("the epoch is over")
        dist.all_gather(regions, regions[own].clone(), group=self.group)


class GlooRing:
    """`kernels.peers.Ring` between two hosts: messages of bytes with a tag, in order, a few under way."""

    def __init__(self, own: int, other: int, slots: int, capacity: int) -> None:
        """
        Args:
            own, other: ranks of the world; one end only publishes, the other only receives.
        """
        self._other = other
        self._slots = [torch.empty(capacity, dtype=torch.uint8) for _ in range(slots)]
        self._works: list[list[dist.Work]] = [[] for _ in range(slots)]
        self._turn = 0
        self._broken = False

    @property
    def is_broken(self) -> bool:
        return self._broken

    def abort(self) -> None:
        """Of this end; a call that waits ends with its world's sockets."""
        self._broken = True

    def slot(self) -> torch.Tensor:
        """uint8 [capacity] to fill; waits until its last message has gone."""
        for work in self._works[self._turn]:
            self._wait(work)
        self._works[self._turn] = []
        return self._slots[self._turn]

    def publish(self, tag: int, num_bytes: int) -> None:
        head = torch.tensor([tag, num_bytes], dtype=torch.int64)
        self._works[self._turn] = [
            self._begin(lambda: dist.isend(head, self._other)),
            self._begin(lambda: dist.isend(self._slots[self._turn][:num_bytes], self._other)),
        ]
        self._heads = head  # until it has gone
        self._turn = (self._turn + 1) % len(self._slots)

    def receive(self) -> tuple[int, torch.Tensor]:
        head = torch.empty(2, dtype=torch.int64)
        self._wait(self._begin(lambda: dist.irecv(head, self._other)))
        tag, num_bytes = map(int, head)
        if not 0 <= num_bytes <= len(self._slots[0]):
            raise PeersBroken(f"a message of {num_bytes} bytes, where at most {len(self._slots[0])} can be")
        message = self._slots[0][:num_bytes]
        self._wait(self._begin(lambda: dist.irecv(message, self._other)))
        return tag, message

    def release(self) -> None:
        """The message of `receive` is not needed any more."""

    def _begin(self, call: Callable[[], dist.Work | None]) -> dist.Work:
        if self._broken:
            raise PeersBroken("the epoch is over")
        try:
            work = call()
        except RuntimeError as error:
            raise PeersBroken(str(error).splitlines()[0]) from error
        assert work is not None, "this rank is in the world"
        return work

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait(TIMEOUT)
        except RuntimeError as error:
            raise PeersBroken(str(error).splitlines()[0]) from error


def interface_of(host: str) -> str | None:
    """The network interface that has this IPv4 address; gloo would take the one that the host's name resolves to."""
    try:
        wanted = socket.inet_aton(host)
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                asked = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                if asked[20:24] == wanted:
                    return name
    return None


def _listens(some: socket.socket) -> bool:
    return bool(some.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _sockets() -> dict[str, int]:
    """This process's open sockets, by names that never come again, unlike their numbers; each with one of those."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{number}")
            if name.startswith("socket:"):
                found[name] = int(number)
    return found
