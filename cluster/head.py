"""Ray: where the service's processes are placed, restarted and watched. The only file that imports ray.

    driver (quire serve)           SchedulerActor   runs cluster.scheduler_server
      RayService  --Ray calls-->   FrontActor       runs cluster.front_process
                                   DeviceActor      runs cluster.keeper, one per rank, each in a bundle with a device

An actor runs its part's own event loop on a thread of its own; tokens never pass Ray. Ray restarts an actor that dies
with the arguments it had, so ports are chosen before and the secret comes with them, in memory.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
import ray._private.worker
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.hosted import DeviceActor, FrontActor, Hosted, SchedulerActor
from cluster.processes import package_folders, package_homes
from cluster.reaper import Reaper
from cluster.service import MAX_DEATHS, START_SECONDS, STOP_SECONDS, Breaker, Note, ServicePlan, describe_event, failure
from pagetable.errors import ConfigError, RequestFailed

NAMESPACE = "quire"
DEVICE = "device"
OBJECT_STORE_BYTES = 80 << 20  # nothing of ours lies there; Ray's least is 75 MiB
CALL_SECONDS = 30.0
ASK_SECONDS = 1.0  # a part on a machine that is gone must not hold up what the others say
REACH_SECONDS = 1.0
_FOREVER = {"max_restarts": -1, "max_task_retries": 0, "num_cpus": 0}
_T = TypeVar("_T")


class RayService:
    """See `cluster.service.Service`. All calls of Ray run on one thread: the event loop stays free for signals.

    Args:
        address: of a running Ray cluster; None starts one on this machine, for this service alone.
        cores: what a cluster started here may count on.
    """

    def __init__(self, plan: ServicePlan, address: str | None, cores: int, note: Note) -> None:
        self._plan, self._address, self._cores, self._note = plan, address, cores, note
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._parts: dict[str, Any] = {}
        self._breakers: dict[str, Breaker] = {}
        self._seen: dict[str, tuple[int, int]] = {}  # part -> (pid, number of the last event noted)
        self._calls: dict[str, tuple[Any, float]] = {}  # part -> the unanswered question for its status, since when
        self._reaper = Reaper()
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.asked_to_stop = asyncio.Event()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._call(self._connect)
        await self._call(self._place)
        await self._call(self._await_ready)

    async def watch(self) -> None:
        while True:
            await self._call(self._look)
            await asyncio.sleep(1.0)

    async def stop(self) -> None:
        self._stopping.set()
        await self._call(self._end)
        self._thread.shutdown()

    async def hurry(self) -> None:
        if "front" in self._parts:
            await asyncio.to_thread(ray.kill, self._parts["front"])
        elif self._address is not None:
            os._exit(1)  # Ray tries to connect for minutes and can't be interrupted; nothing of ours runs yet

    async def _call(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    # On the thread

    def _connect(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        # Ray would print a paragraph on our stdout for each process that dies; `_look` says it in a line.
        ray._private.worker.print_to_stdstream = _say_nothing
        more: dict[str, Any] = {"address": self._address}
        if self._address is None:
            more = {
                "address": "local",
                "num_cpus": max(self._cores, len(self._plan.workers)),
                "num_gpus": len(self._plan.workers) if self._plan.uses_gpus else 0,
                "resources": {} if self._plan.uses_gpus else {DEVICE: len(self._plan.workers)},
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        elif self._address != "auto":
            _check_reach(self._address)
        with _at_home():
            try:
                ray.init(
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=False,
                    **more,
                )
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).partition(". ")[0].strip()
                if self._address is None:
                    raise RequestFailed(f"Ray does not start: {reason}") from None
                limit = f"be a Ray cluster that answers ({reason})"
                cure = "see `ray status`; one that asks for a token wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
                raise ConfigError("--address", self._address, limit, cure) from None
        self._reaper.look()

    def _place(self) -> None:
        plan = self._plan
        kind = self._kind_of_device(len(plan.workers))
        # one group a shard: its ranks talk to each other in every step, those of two shards never
        ranks = plan.num_ranks
        groups = [placement_group([{kind: 1}] * ranks, strategy="PACK") for _ in range(len(plan.workers) // ranks)]
        if not all(group.wait(CALL_SECONDS) for group in groups):
            raise RequestFailed(f"Ray has the devices that it needs, but gave them to somebody else: {kind}")
        hosts = {each["NodeID"]: each["NodeManagerAddress"] for each in _nodes() if each["Alive"]}
        if len(hosts) == 1:
            hosts = dict.fromkeys(hosts, "127.0.0.1")
        node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        try:
            self._make("scheduler", SchedulerActor, plan.scheduler_settings(hosts[node]), node, here)
        except ValueError:
            cure = "stop that one first, or use another cluster"
            raise ConfigError("--address", self._address, "be a cluster without a service of Quire", cure) from None
        device: dict[str, Any] = {"num_gpus": 1} if kind == "GPU" else {"resources": {kind: 1}}
        for shard, group in enumerate(groups):
            nodes = placement_group_table(group)["bundles_to_node_id"]
            for rank in range(ranks):
                index = shard * ranks + rank
                bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
                settings = plan.keeper_settings(index, hosts[node], leader_host=hosts[nodes[0]])
                self._make(f"device-{index}", DeviceActor, settings, nodes[rank], bundle, **device)
        self._make("front", FrontActor, plan.front_settings(hosts[node]), node, here)

    def _make(
        self, name: str, part: type[Hosted], settings: dict[str, Any], node: str, where: Any, **more: Any
    ) -> None:
        homes = package_homes() if node == ray.get_runtime_context().get_node_id() else {}
        made = ray.remote(part).options(name=name, scheduling_strategy=where, **_FOREVER, **more)
        self._parts[name] = made.remote(settings, homes)
        self._breakers[name] = Breaker()

    def _kind_of_device(self, needed: int) -> str:
        """The resource that stands for a device. ConfigError where too few are free: Ray would wait without a word."""
        total, free = _resources()
        kind = "GPU" if self._plan.uses_gpus else DEVICE
        if free.get(kind, 0) < needed:
            ranks = self._plan.num_ranks
            limit = f"be at most {free.get(kind, 0) // ranks:.0f}"
            if ranks > 1:
                limit += f" with {ranks} devices for each shard"
            raise ConfigError(
                "data_parallel_size",
                needed // ranks,
                f"{limit}: {free.get(kind, 0):.0f} of Ray's {total.get(kind, 0):.0f} devices are free",
                f"lower it, add a node: ray start --address=... {_start_flags(kind, needed)}, or run on "
                f"{'cores (--device cpu)' if kind == 'GPU' else 'GPUs (--device cuda)'}",
            )
        return kind

    def _await_ready(self) -> None:
        waiting = set(self._parts)
        end = time.monotonic() + START_SECONDS
        while waiting:
            for name in sorted(waiting):
                status = self._ask(name)
                said = status["said"] if status else {}
                if "failed" in said:
                    raise failure(said["failed"])
                if "ready" in said:
                    waiting.discard(name)
            self._reaper.look()
            if self._stopping.wait(0.05):
                return
            if time.monotonic() > end:
                raise RequestFailed(f"not ready after {START_SECONDS:.0f} s: {', '.join(sorted(waiting))}")

    def _look(self) -> None:
        if self._is_headless():
            raise RequestFailed("Ray's control process (gcs_server) has ended, and with it the cluster")
        for name in self._parts:
            status = self._ask(name)
            if status is None:
                continue
            pid, last = self._seen.get(name, (status["pid"], 0))
            if pid != status["pid"]:
                self._note(f"the {name} is back as process {status['pid']}")
                last = 0
                if self._breakers[name].trips():
                    raise RequestFailed(f"the {name} ended {MAX_DEATHS} times in a minute")
            for number, said in status["events"]:
                if number > last and "stop" in said and self._loop is not None:
                    self._loop.call_soon_threadsafe(self.asked_to_stop.set)
                text = describe_event(said)
                if number > last and text is not None:
                    self._note(text)
                last = max(last, number)
            self._seen[name] = status["pid"], last
        self._reaper.look()

    def _is_headless(self) -> bool:
        return self._address is None and self._reaper.has_lost("gcs_server")

    def _ask(self, name: str) -> dict[str, Any] | None:
        """A part's status; None while it is being restarted or silent."""
        if name not in self._calls:
            self._calls[name] = self._parts[name].status.remote(), time.monotonic()
        call, since = self._calls.pop(name)
        try:
            found: dict[str, Any] = ray.get(call, timeout=ASK_SECONDS)
            return found
        except ActorUnavailableError:
            return None
        except ActorDiedError as error:
            raise RequestFailed(f"the {name} ended for good: {str(error).strip().splitlines()[-1]}") from None
        except GetTimeoutError:
            if time.monotonic() - since < CALL_SECONDS:
                self._calls[name] = call, since
            else:
                self._note(f"the {name} does not answer")
            return None

    def _end(self) -> None:
        """Parts first, in good order; then Ray; then what Ray leaves."""
        self._reaper.look()
        if ray.is_initialized():
            self._stop_parts(["front"], self._plan.drain_seconds + STOP_SECONDS)
            self._stop_parts(["scheduler"], STOP_SECONDS)
            self._stop_parts([name for name in self._parts if name.startswith("device")], STOP_SECONDS)
            self._reaper.look()
            if self._is_headless():
                atexit.unregister(ray.shutdown)  # it would wait a minute for what has ended
                self._reaper.reap(0.0)
                return
            for part in self._parts.values():
                ray.kill(part)
            ray.shutdown()  # the placement group ends with the job
        self._reaper.reap(5.0)

    def _stop_parts(self, names: list[str], seconds: float) -> None:
        calls = [self._parts[name].stop.remote(seconds) for name in names if name in self._parts]
        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(calls, timeout=seconds + 5.0)


def _start_flags(kind: str, needed: int) -> str:
    """What a node's `ray start` says of its devices."""
    return f"--num-gpus={needed}" if kind == "GPU" else f"--resources='{{\"{DEVICE}\": {needed}}}'"


def _check_reach(address: str) -> None:
    """ConfigError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or "no answer").lower()
        limit = f"be a Ray cluster that can be reached ({reason})"
        raise ConfigError("--address", address, limit, "start one: ray start --head") from None


def _nodes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def _resources() -> tuple[dict[str, float], dict[str, float]]:
    """All of the cluster's, and what of them is free."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return total, free


def _say_nothing(*_: object, **__: object) -> None:
    pass


@contextlib.contextmanager
def _at_home() -> Iterator[None]:
    """Ray puts the driver's folder first on every actor's path: a `worker/` of the user's there would replace ours."""
    here, path = os.getcwd(), os.environ.get("PYTHONPATH")
    folders = package_folders()
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [path])])
    os.chdir(folders[0])
    try:
        yield
    finally:
        os.chdir(here)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
