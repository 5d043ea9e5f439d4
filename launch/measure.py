"""`quire plan --measure`: the constants of this machine's cores, from the kernels and the step that serve."""

from __future__ import annotations

import mmap
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from kernels import cpu, ops
from kernels.cpu import Native
from kernels.decoder import DecoderShape, LayerRows, MlpRows, NativeDecoder, Rows, huge_memory
from kernels.ops import Mask, PageList
from kernels.peers import SharedPeers
from launch.llm import LLM
from launch.machine import available_cores, available_memory
from launch.models.catalog import resolve
from pagetable.errors import NotSupported
from pagetable.hardware import Hardware
from pagetable.sampling import SamplingParams
from worker.cores import Cores
from worker.loop import Inline
from worker.runner import Runner

_READ_BYTES = 1 << 28  # of a buffer; more than caches hold
_ROWS = (1, 2, 4, 8, 14, 16, 32, 64, 256)  # of products; the kernel's tiles have 14 rows, so 16 take two
_BLOCK = 16
_SAMPLES, _REPEATS = 7, 4
_RESERVE = 2.5e8  # a rank's process with torch: PSS of 210 MB, measured, and stacks
# assumed where only one host can be seen: gloo between two network namespaces of one machine, 0.24 ms and 1 GB/s
_NETWORK_S, _NETWORK_RATE = 2.4e-4, 1.0e9
_PLAN_S = 4e-5  # traced: a message in shared memory, with caches as a step leaves them

SOURCES = {
    "reserve_bytes": "a process with torch",
    "plan_s": "not measured: a message in shared memory",
    "float32_share": "not measured: registers hold half as many",
    "network_exchange_s": "not measured: gloo between two namespaces of one machine",
    "network_bytes_per_s": "not measured: the same",
}


def measure(cores: int | None = None, say: Callable[[str], None] = lambda text: None) -> Hardware:
    """The constants of one core, where `cores` of them make a host. Takes fifteen seconds of an idle machine.

    Args:
        cores: default: those that this process may use.
        say: called with a line before each part.

    Errors: NotSupported where there are no native kernels, whose constants these are.
    """
    backend = ops.default_backend()
    if not isinstance(backend, Native):
        missing = cpu.why_missing()
        why = f"{missing} {cpu.CURE}" if missing else "the native kernels are switched off; unset QUIRE_KERNELS"
        raise NotSupported(f"quire plan --measure: {why}")
    cores = available_cores() if cores is None else cores
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(backend, cores, say)
    finally:
        torch.set_num_threads(before)


def _measure(backend: Native, cores: int, say: Callable[[str], None]) -> Hardware:
    say("reading memory")
    together = read_rate(cores)
    say("products and attention")
    wide, layers = _Wide(backend), _Layers(backend)
    slow_read, decode, prefill = attentions = _Attention(1, 1, 128), _Attention(7, 1, 64), _Attention(7, 1, 64, 256)
    calls: list[Callable[[], object]] = [partial(wide.head, rows) for rows in _ROWS]
    calls += [layers.forward, *(each.attend for each in attentions)]
    alone, seconds = _beside_reading(calls)
    read = max(alone, together / cores)
    products = tuple((rows, wide.flop(rows) / each) for rows, each in zip(_ROWS, seconds[: len(_ROWS)], strict=True))
    of_layers, of_slow_read, of_decode, of_prefill = seconds[len(_ROWS) :]
    say("barriers and exchanges")
    barrier = _barrier(backend, cores)
    latency, rate = _exchange(backend)
    say("planning")
    step, row = _planning()
    return Hardware(
        kind="cpu",
        devices_per_host=cores,
        memory_bytes=float((available_memory() or 8 << 30) // cores),
        reserve_bytes=_RESERVE,
        read_bytes_per_s=read,
        host_read_bytes_per_s=max(together, read),
        product_flops=products,
        float32_share=0.5,
        elements_per_s=layers.elements_per_s(of_layers, products[-1][1]),
        attention_read_share=min(1.0, slow_read.num_bytes / of_slow_read / read),
        attention_decode_flops=decode.flop / of_decode,
        attention_prefill_flops=prefill.flop / of_prefill,
        layer_s=0.0,
        barrier_s=barrier,
        step_s=step,
        row_s=row,
        plan_s=_PLAN_S,
        collective="exchange",
        exchange_s=latency,
        exchange_bytes_per_s=rate,
        network_exchange_s=_NETWORK_S,
        network_bytes_per_s=_NETWORK_RATE,
        activation_bytes=4,
    )


def _beside_reading(calls: Sequence[Callable[[], object]]) -> tuple[float, list[float]]:
    """(bytes/s of plain reading by one thread, CPU seconds of each call), of the same state of the memory.

    On a virtual machine that changes within seconds, and with it whatever reads much. So all calls take turns, each
    behind a reading, and of a call those turns count, the quicker half, whose reading was quickest. CPU time, since
    neighbours on the core do not lengthen it.
    """
    buffer = torch.ones(_READ_BYTES // 4)
    turns: list[list[tuple[float, float]]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(_SAMPLES):
        for call, found in zip(calls, turns, strict=True):
            found.append((_seconds(partial(cpu.read, buffer), time.thread_time), _seconds(call, time.thread_time)))
    best = [sorted(found)[: (len(found) + 1) // 2] for found in turns]
    reading = statistics.median(reading for found in best for reading, _ in found)
    return _READ_BYTES / reading, [statistics.median(seconds for _, seconds in found) for found in best]


def _wall_seconds(call: Callable[[], object], samples: int | None = None) -> float:
    """Time of what several threads do together: the least of some calls, when others left the machine alone, after one
    that does not count."""
    call()
    return min(_seconds(call, time.perf_counter) for _ in range(_SAMPLES if samples is None else samples))


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _together(calls: Sequence[Callable[[], object]]) -> None:
    """All at once, on threads of their own; the kernels run without the interpreter's lock."""
    faults: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # handed to the caller's thread
            faults.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if faults:
        raise faults[0]


def _repeated(call: Callable[[], object]) -> Callable[[], None]:
    """Several calls: longer by far than threads take to start."""

    def several() -> None:
        for _ in range(_REPEATS):
            call()

    return several


def read_rate(readers: int) -> float:
    """Bytes/s of plain reading by so many threads at once."""
    buffers = [torch.ones(_READ_BYTES // 4) for _ in range(readers)]

    seconds = _wall_seconds(lambda: _together([_repeated(partial(cpu.read, buffer)) for buffer in buffers]))
    return _REPEATS * readers * _READ_BYTES / seconds


class _Toy:
    """A decoder of constant weights, and rows that stand at position 0 of pages of their own."""

    def __init__(
        self, backend: Native, shape: DecoderShape, layers: int, threads: int, max_rows: int, head: int = 0
    ) -> None:
        self.shape, self.layers = shape, layers
        dim, hidden, q = shape.head_dim, shape.hidden, shape.q_heads * shape.head_dim
        norm = torch.ones(hidden)
        frequencies = torch.ones(dim // 2, dtype=torch.float64)
        kind = torch.bfloat16
        embedding = _numbers(shape.vocab, hidden)
        self.decoder = NativeDecoder(shape, kind, embedding, norm, frequencies, backend, threads)
        qkv, o = _rows(q + 2 * shape.kv_heads * dim, hidden), _rows(hidden, q)
        gate, down = _numbers(shape.intermediate, hidden), _rows(hidden, shape.intermediate)
        for _ in range(layers):
            mlp = MlpRows(norm, Rows.paired(gate, gate, None, None), down)
            self.decoder.add_layer(LayerRows(norm, None, None, qkv, o, mlp, 0))
        if head:
            self.decoder.set_head(_rows(head, hidden))
        size = layers * max_rows * 2 * shape.kv_heads * _BLOCK * dim
        self.pool = torch.frombuffer(huge_memory(2 * size), dtype=kind).view(
            layers, max_rows, 2, shape.kv_heads, _BLOCK, dim
        )

    def forward(self, rows: int, peers: SharedPeers | None = None) -> None:
        starts = torch.arange(rows + 1, dtype=torch.int32)
        pages = PageList(starts, torch.arange(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32))
        mask = Mask(torch.zeros(rows, dtype=torch.int32))
        tokens, slots = torch.zeros(rows, dtype=torch.int64), torch.arange(rows) * _BLOCK
        self.decoder.forward(tokens, tokens, slots, starts, self.pool, {0: pages}, {0: mask}, tensor=peers)

    def head(self, rows: int) -> None:
        hidden = torch.ones(rows, self.shape.hidden)
        self.decoder.head(hidden, np.arange(rows, dtype=np.int64), logits=False)


def _numbers(rows: int, columns: int) -> torch.Tensor:
    return torch.full((rows, columns), 0.01, dtype=torch.bfloat16)


def _rows(rows: int, columns: int) -> Rows:
    return Rows.beside((_numbers(rows, columns),), (None,))


class _Wide:
    """A product whose weights no cache holds."""

    _DEPTH, _COLUMNS = 1024, 1 << 16

    def __init__(self, backend: Native) -> None:
        shape = DecoderShape(self._DEPTH, 1, 1, 64, 32, 32, 1e-6, 1.0, (0,))
        self.head = _Toy(backend, shape, 1, 1, 1, head=self._COLUMNS).head

    def flop(self, rows: int) -> float:
        return 2.0 * rows * self._DEPTH * self._COLUMNS


def _thin() -> DecoderShape:
    """Layers with next to no products: what is left are norms, barriers and exchanges."""
    return DecoderShape(2048, 1, 1, 16, 16, 32, 1e-6, 1.0, (0,))


class _Layers:
    """What layers take beside their products, at as many rows as the last of `_ROWS`."""

    _COUNT = 4

    def __init__(self, backend: Native) -> None:
        shape = DecoderShape(1024, 16, 2, 64, 2816, 32, 1e-6, 1.0, (0,))
        self._rows = _ROWS[-1]
        self._toy = _Toy(backend, shape, self._COUNT, 1, self._rows)

    def forward(self) -> None:
        self._toy.forward(self._rows)

    def elements_per_s(self, seconds: float, flops: float) -> float:
        """Args: seconds: of `forward`. flops: of products of as many rows."""
        qkv, q = (16 + 2 * 2) * 64, 16 * 64
        weights, whole = 1024 * (qkv + q + 3 * 2816), seconds / self._COUNT
        left = max(whole - 2 * self._rows * weights / flops, 0.01 * whole)
        return self._rows * (4 * 1024 + qkv + q + 2816) / left


def _barrier(backend: Native, cores: int) -> float:
    """Seconds that a thread beside the first adds to each barrier of a layer with one row."""
    if cores == 1:
        return 0.0
    layers = 64
    one, two = (_Toy(backend, _thin(), layers, threads, 1) for threads in (1, 2))
    alone = _wall_seconds(lambda: one.forward(1), 20)
    # with one row and products this thin each thread does nearly all of it for itself; what is more is waiting
    return max(0.0, _wall_seconds(lambda: two.forward(1), 20) - alone) / (layers * 9)


class _Attention:
    """Of one core: eight rows that decode, or a chunk of `queries` at the end of 8,192 keys."""

    def __init__(self, heads: int, kv_heads: int, dim: int, queries: int = 1) -> None:
        rows, context = (8, (1 << 28) // (8 * 4 * kv_heads * dim)) if queries == 1 else (1, 8192)
        context = context // _BLOCK * _BLOCK
        blocks = rows * context // _BLOCK
        shape = (1, blocks, 2, kv_heads, _BLOCK, dim)
        pool = torch.frombuffer(huge_memory(blocks * 4 * kv_heads * _BLOCK * dim), dtype=torch.bfloat16).view(shape)
        pool.fill_(0.01)
        each = torch.arange(context // _BLOCK, dtype=torch.int32) * _BLOCK
        starts = torch.arange(rows + 1, dtype=torch.int32)
        pages = PageList(starts * len(each), torch.arange(blocks, dtype=torch.int32), each.repeat(rows))
        mask = Mask(torch.full((rows,), context - queries, dtype=torch.int32))
        q = torch.full((rows * queries, heads, dim), 0.01, dtype=torch.bfloat16)
        self.attend = partial(ops.attend, q, starts * queries, (pool,), 0, pages, mask)
        self.num_bytes = rows * context * 4 * kv_heads * dim
        self.flop = 4 * rows * queries * (context - (queries - 1) / 2) * heads * dim


class _Pair:
    """Two ranks of equal layers, which meet or not, each on its own cores where it has some."""

    def __init__(
        self, backend: Native, shape: DecoderShape, layers: int, max_rows: int, cores: Sequence[Cores]
    ) -> None:
        self.layers, self._cores = layers, cores
        self._toys = [_Toy(backend, shape, layers, 1, max_rows) for _ in range(2)]
        capacity = shape.tensor_bytes(max_rows)
        memory = mmap.mmap(-1, SharedPeers.num_bytes(2, capacity))
        self._peers = [SharedPeers(memory, 0, rank, 2, capacity) for rank in range(2)]
        for peer, own in zip(self._peers, cores, strict=True):
            peer.struct.reads_ahead = bool(own.cpus)  # as a shard's ranks do

    def extra(self, rows: int, samples: int) -> float:
        """Seconds that an exchange adds to layers of both at once."""
        found = []
        for _ in range(samples + 1):
            apart = self._seconds(rows, (None, None))
            found.append((self._seconds(rows, self._peers) - apart) / (2 * self.layers))
        return max(1e-7, statistics.median(found[1:]))

    def _seconds(self, rows: int, peers: Sequence[SharedPeers | None]) -> float:
        """Of the later of the two."""
        begin, found = threading.Barrier(2), [0.0, 0.0]

        def run(rank: int) -> None:
            self._cores[rank].stay()
            forward = _repeated(partial(self._toys[rank].forward, rows, peers[rank]))
            begin.wait()
            start = time.perf_counter()
            forward()
            found[rank] = time.perf_counter() - start

        _together([partial(run, rank) for rank in range(2)])
        return max(found) / _REPEATS


def _exchange(backend: Native) -> tuple[float, float]:
    """(seconds of an exchange, its bytes/s): how much longer a step takes with a peer.

    Two ranks that read weights from memory are late in turn, so most of an exchange is waiting for the other.
    """
    many = 256
    thin, thick = _thin(), DecoderShape(1024, 8, 1, 64, 2816, 32, 1e-6, 1.0, (0,))
    cores = [Cores.claim(1) for _ in range(2)]
    try:
        latency = _Pair(backend, thick, 8, 1, cores).extra(1, 50)
        pair = _Pair(backend, thin, 16, many, cores)
        moving = max(1e-7, pair.extra(many, _SAMPLES) - pair.extra(1, 15))
    finally:
        for each in cores:
            each.release()
    return latency, 2 * many * thin.hidden * 4 / moving


class _Timed:
    """What a runner calls for a step, timed: some methods of some objects, the first of which is called once a step."""

    def __init__(self, runner: Runner) -> None:
        self.seconds, self.steps = 0.0, 0
        if runner.plain is not None:
            self._wrap(runner.plain, "run", is_step=True)
        self._wrap(runner.model, "forward", is_step=True)
        self._wrap(runner.model, "head", is_step=False)

    def _wrap(self, owner: Any, name: str, *, is_step: bool) -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **more: Any) -> Any:
            start = time.thread_time()
            found = call(*args, **more)
            self.seconds += time.thread_time() - start
            self.steps += is_step and found is not None
            return found

        setattr(owner, name, timed)


def _planning() -> tuple[float, float]:
    """(seconds of a step, seconds of a row) outside the model, from batches of a bundled one."""
    llm = LLM(resolve("story"), threads=1, num_gpu_blocks_override=1024, max_num_seqs=64)
    assert isinstance(llm.loop.pipe, Inline) and isinstance(llm.loop.pipe.runner, Runner)
    timed = _Timed(llm.loop.pipe.runner)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)

    def outside(rows: int) -> float:
        samples = []
        for _ in range(_SAMPLES):
            timed.seconds, timed.steps = 0.0, 0
            start = time.thread_time()
            llm.generate([[2 + row] for row in range(rows)], params)
            samples.append((time.thread_time() - start - timed.seconds) / timed.steps)
        return min(samples)

    one, many = outside(1), outside(64)
    row = max(0.0, many - one) / 63
    return max(0.0, one - row), row
