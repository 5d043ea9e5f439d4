"""`quire serve`: a plan of all processes from the configuration, and their life from here, with Ray or without.

check -> plan -> start -> "ready on ..." -> SIGTERM or Ctrl-C -> drain -> stop
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.admin import default_path
from cluster.ray_token import RayToken
from cluster.service import Service, ServicePlan
from launch.config import EngineConfig, show_size
from launch.devices import check_gpu, choose_device
from launch.flags import Effective
from launch.gpus import VARIABLE, visible_gpus
from launch.machine import available_cores, available_memory
from launch.memory import MemoryPlan, step_limit
from launch.serve_flags import ServeConfig, choose_port, read_serve
from pagetable.errors import ConfigError
from worker.layout import Layout
from worker.model_config import ModelConfig
from worker.ways import Ways

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EXAMPLE = "Once upon a time"


def serve(found: argparse.Namespace, engine: Effective) -> int:
    """The subcommand. Returns once the service has ended in good order; raises QuireError where it can't be."""
    config = read_serve(found)
    if config.detach and not found.dry_run:
        from launch.detach import detach

        make_plan(config, engine.config)  # what is refused is refused here, where somebody reads it
        return detach(sys.argv[1:])
    plan, lines = make_plan(config, engine.config)
    if found.dry_run:
        print("\n".join(lines))
        return 0
    if changed := engine.changed():
        lines.insert(0, "not default: " + ", ".join(changed))
    for line in lines:
        _note(line)
    with _service(config, plan) as service:
        asyncio.run(_live(service, plan))
    return 0


def make_plan(config: ServeConfig, engine: EngineConfig) -> tuple[ServicePlan, list[str]]:
    """What every process gets, and lines for people. ConfigError before anything is started."""
    folder, name = resolve_model(engine.model)
    replicas = engine.data_parallel_size
    is_here = config.address is None
    # the GPUs of other machines can't be seen from here
    device = engine.device if engine.device == "cuda" and not is_here else choose_device(engine)
    if device != "cpu":
        check_gpu(engine)
    if is_here:
        _check_cores(replicas)
    memory = _memory_plan(dataclasses.replace(engine, model=str(folder)), folder, replicas, is_here, device)
    layout = engine.layout
    num_ranks = replicas * layout.num_ranks
    threads = engine.threads if engine.threads is not None else max(1, available_cores() // num_ranks)
    team = threads * layout.tensor
    limit = step_limit(
        ModelConfig.from_folder(folder), memory.shard, team if config.address else min(team, available_cores())
    )
    workers = tuple(
        worker
        for index in range(replicas)
        for worker in _ranks(
            {
                "folder": str(folder),
                "shard_id": index,
                "device_id": index * layout.pipeline * layout.page,
                "dtype": memory.dtype,
                "model": name,
                "threads": threads,
                "pin": engine.pins(num_ranks, threads),
                "device": device,
                "shard": dataclasses.asdict(memory.shard),
                "step_limit": limit,
            },
            layout,
            engine.ways,
        )
    )
    port = choose_port("--port", config.host, config.port)
    metrics = config.metrics_port if config.metrics_port is not None else port + 1 if config.port else 0
    front = {
        "host": config.host,
        "port": port,
        "metrics_port": choose_port("--metrics-port", "127.0.0.1", metrics),
        "metrics_compat": config.metrics_compat,
        "service_pid": os.getpid() if config.address is None else 0,
        "admin_socket": os.path.abspath(config.admin_socket or default_path(port)),
        "folder": str(folder),
        "model": name,
        "api_keys": config.api_keys and os.path.abspath(config.api_keys),
        "tls": config.tls,
        "seed": engine.seed,
        "insecure": config.insecure,
        "drain_seconds": config.drain_seconds,
    }
    plan = ServicePlan(
        secret=secrets.token_bytes(32),
        scheduler_port=choose_port("scheduler", "127.0.0.1", 0),
        front=front,
        workers=workers,
        environment={"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")},
        drain_seconds=config.drain_seconds,
        step_limit=limit,
        uses_gpus=device != "cpu",
        gpus=_gpu_names(replicas) if device != "cpu" and not config.ray else (),
    )
    of_ranks = f" of {layout.num_ranks} ranks" if layout.num_ranks > 1 else ""
    words = f"{_count(replicas, 'shard')}{of_ranks}, each with {_count(threads, 'thread')}:"
    lines = [words, *(f"  {line}" for line in memory.describe())]
    if config.address is None and num_ranks > available_cores():
        lines.append(f"{num_ranks} ranks share {_count(available_cores(), 'core')}: they will wait for each other")
    return plan, lines


def _ranks(shard: dict[str, Any], layout: Layout, ways: Ways) -> list[dict[str, Any]]:
    """The settings of each rank of a shard, from those that all have."""
    if layout.num_ranks == 1:
        return [shard]
    more = {
        "layout": dataclasses.asdict(layout),
        "ways": dataclasses.asdict(ways),
        "leader_port": choose_port("ranks", "127.0.0.1", 0),
    }
    return [{**shard, **more, "rank": rank} for rank in range(layout.num_ranks)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def resolve_model(model: str) -> tuple[Path, str]:
    """The folder to load and the name that users see."""
    from launch.models.catalog import resolve

    folder = Path(resolve(model)).absolute()
    return folder, folder.resolve().name


def _check_cores(replicas: int) -> None:
    cores = available_cores()
    if replicas > cores:
        limit = f"be at most {cores}: each shard keeps one core of this machine busy"
        raise ConfigError(
            "data_parallel_size", replicas, limit, "lower it, or join a Ray cluster that has more (--address)"
        )


def _gpu_names(count: int) -> tuple[str, ...]:
    """The first GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: each worker sees one alone."""
    shown = os.environ.get(VARIABLE)
    return tuple((shown.split(",") if shown is not None else list(map(str, range(count))))[:count])


def _gpu_plan(engine: EngineConfig, folder: Path, replicas: int, is_here: bool) -> MemoryPlan:
    """Each shard has a GPU to itself. On a cluster the GPUs are taken to be as this machine's, where it has one."""
    gpus = visible_gpus()
    if is_here and replicas > len(gpus):
        limit = f"be at most {len(gpus)}: each shard has a GPU of this machine to itself"
        cure = "lower it, or join a Ray cluster that has more (--address)"
        raise ConfigError("data_parallel_size", replicas, limit, cure)
    if not gpus and engine.num_gpu_blocks_override is None and engine.kv_cache_memory_bytes is None:
        limit = "be given with --address and --device cuda where this machine has no GPU to ask"
        raise ConfigError("kv_cache_memory_bytes", None, limit, "say what the pool of each GPU may take")
    free = min((gpu.free_bytes for gpu in gpus[:replicas]), default=None)
    return MemoryPlan.make(engine, ModelConfig.from_folder(folder), free, "cuda")


def _memory_plan(engine: EngineConfig, folder: Path, replicas: int, is_here: bool, device: str) -> MemoryPlan:
    """Each shard has its own weights and pool; all must fit together where all are on this machine.

    On a cluster nobody knows yet how many will share a machine: a pool whose size was asked for may then take one of
    this size alone, and any other is cut as if all shards were on one.
    """
    if device != "cpu":
        return _gpu_plan(engine, folder, replicas, is_here)
    free = available_memory()
    sized = engine.num_gpu_blocks_override is not None or engine.kv_cache_memory_bytes is not None
    share = free if free is None or (sized and not is_here) else free // replicas
    plan = MemoryPlan.make(engine, ModelConfig.from_folder(folder), share)
    each = plan.weight_bytes + plan.num_blocks * plan.block_bytes
    if is_here and free is not None and each * replicas > free:
        limit = f"leave each shard {show_size(each)} of the {show_size(free)} that are free"
        cure = f"at most {free // each} fit; lower it, or give each a smaller pool (--kv-cache-memory-bytes)"
        raise ConfigError("data_parallel_size", replicas, limit, cure)
    return plan


@contextlib.contextmanager
def _service(config: ServeConfig, plan: ServicePlan) -> Iterator[Service]:
    if not config.ray:
        from launch.local import LocalService

        yield LocalService(plan, _note)
        return
    token = RayToken() if config.address is None else None
    try:
        from cluster.head import RayService

        yield RayService(plan, config.address, available_cores(), _note)
    finally:
        if token is not None:
            token.remove()


async def _live(service: Service, plan: ServicePlan) -> None:
    """Start, say that it is ready, wait for a signal or a failure, stop. A second signal ends the drain."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()

    def listen() -> None:
        for number in _SIGNALS:
            loop.add_signal_handler(number, signals.put_nowait, number)

    listen()
    signalled = asyncio.create_task(signals.get(), name="signals")
    starting = asyncio.create_task(service.start(), name="start")
    try:
        while not (starting.done() or signalled.done()):
            await asyncio.wait([starting, signalled], timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
            listen()  # Ray's start puts handlers of its own in place of ours
        if starting.done():
            starting.result()
            _announce(plan)
            watching = asyncio.create_task(service.watch(), name="watch")
            asked = asyncio.create_task(service.asked_to_stop.wait(), name="asked")
            await asyncio.wait([watching, signalled, asked], return_when=asyncio.FIRST_COMPLETED)
            await _ended(asked)
            if not await _ended(watching):
                watching.result()
    finally:
        await _ended(starting)
        stopping = asyncio.create_task(service.stop(), name="stop")
        await _ended(signalled)
        signalled = asyncio.create_task(signals.get(), name="signals")
        await asyncio.wait([stopping, signalled], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await service.hurry()
        await stopping
        await _ended(signalled)


async def _ended(task: asyncio.Task[Any]) -> bool:
    """Whether a task had to be cancelled; it is over either way."""
    was_running = not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return was_running


def _announce(plan: ServicePlan) -> None:
    front = plan.front
    host = f"[{front['host']}]" if ":" in front["host"] else front["host"]
    reach = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    _note(f"metrics on http://127.0.0.1:{front['metrics_port']}/metrics")
    _note(f"admin socket {front['admin_socket']}; to end the service: quire stop --port {front['port']}")
    paste = f'quire generate --server {reach}:{front["port"]} --prompt "{_EXAMPLE}"'
    print(f"ready on {host}:{front['port']}: {paste}", flush=True)


def _note(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"quire: {text}", file=sys.stderr, flush=True)
