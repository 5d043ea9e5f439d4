"""Door: where a shard's leader listens for its ranks. Strangers are closed and counted; those who prove the secret are
handed on, each on a thread of its own."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable

from pagetable.frames import BadFrame
from worker.channel import Channel

_log = logging.getLogger(__name__)

MAX_GREETINGS = 64  # connections that have proven nothing yet
_RETRY_SECONDS = 0.05


class Door:
    """Listens from the start until `close`.

    Args:
        num_ranks: of the shard; the leader is rank 0 and never comes.
        serve: called with each channel, its rank, and the epoch whose plans it is for (None: for control); runs for as
            long as it likes on a thread of its own.

    Attributes:
        address: where it listens.
        num_bad: connections that ended because of what came over them.

    Errors: OSError where it cannot listen.
    """

    def __init__(
        self,
        host: str,
        port: int,
        num_ranks: int,
        secret: bytes,
        serve: Callable[[Channel, int, int | None], None],
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=MAX_GREETINGS)
        found = self._listener.getsockname()
        self.address = str(found[0]), int(found[1])
        self.num_bad = 0
        self._num_ranks, self._secret, self._serve = num_ranks, secret, serve
        self._greetings = threading.Semaphore(MAX_GREETINGS)
        self._closed = False
        threading.Thread(target=self._accept, name="ranks", daemon=True).start()

    def close(self) -> None:
        """Listen no more; the port is free."""
        self._closed = True
        with contextlib.suppress(OSError):  # `close` alone would leave `accept` waiting, and the port taken
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed or error.errno in (errno.EBADF, errno.EINVAL):
                    return
                time.sleep(_RETRY_SECONDS)  # no descriptor is free, or the peer has gone again
                continue
            if not self._greetings.acquire(blocking=False):
                self.num_bad += 1
                connection.close()
                continue
            threading.Thread(target=self._meet, args=(connection,), name="rank", daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        try:
            try:
                channel, name = Channel.welcome(connection, self._secret)
            finally:
                self._greetings.release()
            rank, epoch = self._parsed(channel, name)
        except (OSError, BadFrame) as error:
            self.num_bad += 1
            _log.warning("a rank's connection: %s", error)
            return
        self._serve(channel, rank, epoch)

    def _parsed(self, channel: Channel, name: str) -> tuple[int, int | None]:
        rank, _, purpose = name.partition("/")
        try:
            number, epoch = int(rank), None if purpose == "control" else int(purpose)
            if not 0 < number < self._num_ranks:
                raise ValueError(number)
        except ValueError:
            channel.shut()
            raise BadFrame(f"{name[:40]!r} is no rank and purpose here") from None
        return number, epoch
