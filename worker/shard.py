"""One shard, put together: model, pages, tables, sampler, scheduler, loop; alone or as one of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch

from kernels import cpu, ops
from kernels.cpu import Native
from pagetable.allocator import BlockAllocator
from pagetable.errors import ConfigError
from pagetable.ids import DeviceId
from pagetable.page import PagePool
from worker.config import ShardConfig
from worker.cores import Cores
from worker.gpu_model import GPU_CHUNK, GpuModel
from worker.heads import row_bytes
from worker.kv_cache import CPU, PagedKVCache
from worker.layout import Layout, Part
from worker.loop import Inline, Loop, Pipe, Threaded
from worker.model import Decoder
from worker.model_config import ModelConfig
from worker.native_model import NativeModel
from worker.rank import Rank
from worker.ranks import Ranks
from worker.runner import Model, Runner
from worker.sampler import CHUNK, Sampler, choose_by_torch
from worker.scheduler import ShardScheduler
from worker.segment import Sizes
from worker.tables import TableMirror
from worker.ways import Ways
from worker.weights import Progress, Weights, open_weights

_LEAST_HEAD_ROWS = 8  # whose logits go over in one exchange


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What a shard is; equal on all its ranks.

    Attributes:
        dtype: float32 or bfloat16, of weights, and of pages where `config` names no other.
        first_device: what the entries of its block tables name: this one and the next, one for each stage and group.
        ways: how its ranks talk to each other.
        device: what it runs on: "cpu", or "cuda", the first GPU that its process sees.
        threads: that work on a step, of each rank; they decide in what bands ranks sum the rows of a long one.
    """

    folder: Path
    model: ModelConfig
    config: ShardConfig
    dtype: str
    layout: Layout = field(default_factory=Layout)
    first_device: int = 0
    ways: Ways = field(default_factory=Ways)
    device: str = "cpu"
    threads: int = 1

    @property
    def identity(self) -> bytes:
        """Ranks with another one cannot work together."""
        same = self.model, self.config, self.dtype, self.layout, self.ways, self.threads
        return sha256(repr(same).encode()).digest()

    @property
    def devices(self) -> list[int]:
        layout = self.layout
        return [
            layout.device_id(stage, group, self.first_device)
            for stage in range(layout.pipeline)
            for group in range(layout.page)
        ]

    @property
    def device_block_bytes(self) -> list[int]:
        """Of one block of each of `devices`, over the ranks that hold it together."""
        row = PagedKVCache.row_bytes(self.model, page_dtype(self.config, self.dtype))
        parts = self.layout.parts(self.model)[:: self.layout.tensor]
        sizes = [part.device_block_bytes(self.config.block_size, row) for part in parts]
        return [size for size in sizes for _ in range(self.layout.page)]

    def group_blocks(self, group: int) -> int:
        """Blocks of a group's pool, in each column: the pages are dealt out evenly."""
        pages, groups = self.config.num_blocks, self.layout.page
        return pages // groups + (group < pages % groups)

    def sizes(self) -> Sizes:
        """Of the messages between ranks, for the largest step that can be planned."""
        model, layout = self.model, self.layout
        tokens = self.config.max_num_batched_tokens + self.config.block_size
        hidden = tokens * model.hidden_size * 4
        parts = layout.parts(model)
        widest = max(len(part.vocab) for part in parts)
        attended = model.num_heads // layout.num_slices
        row = PagedKVCache.row_bytes(model, page_dtype(self.config, self.dtype))
        block = parts[0].block_bytes(self.config.block_size, row) // len(parts[0].layers)
        return Sizes(
            tensor=max(hidden, _LEAST_HEAD_ROWS * row_bytes(widest, logits=True)),
            slice=max(tokens * attended * (model.head_dim + 1) * 4, block),
            ring=hidden * (1 + any(part.is_cut for part in parts)),
            tokens=4 * self.config.max_num_seqs if self.config.async_scheduling and layout.pipeline > 1 else 0,
        )


def build_loop(
    folder: Path,
    model: ModelConfig,
    config: ShardConfig,
    dtype: str,
    device_id: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
) -> Loop:
    """Load a model and everything around it, on one rank.

    Args:
        dtype: float32 or bfloat16, of weights, and of pages where the configuration names no other.
        device_id: what the entries of this shard's block tables name.
        threads: that work on a step.
        progress: called with (bytes done, bytes in all) while weights load.
    """
    spec = ShardSpec(folder, model, config, dtype, first_device=device_id, threads=threads)
    return make_loop(spec, make_pipe(spec, build_runner(spec, 0, progress)))


def make_pipe(spec: ShardSpec, runner: Runner) -> Inline | Threaded:
    """What carries out the plans of a shard of one rank."""
    return Threaded(runner) if spec.config.async_scheduling else Inline(runner)


def make_loop(spec: ShardSpec, pipe: Pipe) -> Loop:
    """A scheduler over fresh pages: nothing of an earlier epoch is in it."""
    layout = spec.layout
    columns = [
        [
            BlockAllocator(DeviceId(layout.device_id(stage, group, spec.first_device)), spec.group_blocks(group))
            for group in range(layout.page)
        ]
        for stage in range(layout.pipeline)
    ]
    identity = page_identity(spec.model, spec.config, spec.dtype)
    return Loop(ShardScheduler(spec.config, PagePool(columns), identity), pipe)


def build_runner(spec: ShardSpec, rank: int, progress: Progress | None = None) -> Runner:
    """A rank's weights, pages, tables and sampler."""
    model, config, layout = spec.model, spec.config, spec.layout
    part = layout.part(model, rank)
    kind: torch.dtype = getattr(torch, spec.dtype)
    weights, device = open_weights(spec.folder), torch.device(spec.device)
    backend = ops.backend_for(device)
    decoder = build_model(
        model,
        weights,
        kind,
        spec.threads,
        progress,
        part=part,
        deterministic=config.deterministic,
        device=device,
        backend=backend,
    )
    blocks, pages = spec.group_blocks(part.group), page_dtype(config, spec.dtype)
    if pages == torch.int8 and not backend.takes.int8:
        limit = f"be auto on {device.type}: its kernels ({backend.name}) read no pages of int8"
        raise ConfigError("kv_cache_dtype", config.kv_cache_dtype, limit, "leave it out")
    cache = PagedKVCache(
        model, blocks, config.block_size, pages, part, device, backend, preallocate=config.preallocate_kv_cache
    )
    if isinstance(decoder, GpuModel) and device.type != "cpu":
        try:
            decoder.warm_up(cache)
        except torch.OutOfMemoryError:
            limit = f"leave room for a step on {device}"
            raise ConfigError("num_gpu_blocks_override", blocks, limit, "give the pool less memory") from None
    tables = TableMirror(
        config.max_num_seqs,
        -(-config.max_model_len // config.block_size),
        config.block_size,
        column=part.stage,
        group=part.group if layout.page > 1 else None,
    )
    choose = choose_by_torch if isinstance(decoder, Decoder) else decoder.choose
    chunk = GPU_CHUNK if isinstance(decoder, GpuModel) else CHUNK
    sampler = Sampler(model.vocab_size, config.max_num_seqs, choose, chunk)
    first = part.stage * layout.tensor
    widths = tuple(len(each.vocab) for each in layout.parts(model)[first : first + layout.tensor])
    return Runner(decoder, cache, tables, sampler, part, widths, fills_tokens=config.async_scheduling)


def make_ranks(spec: ShardSpec, secret: bytes, cores: Cores | None = None) -> Ranks:
    """Several ranks as their leader sees them, without its own runner yet, which belongs on `cores`."""
    part = spec.layout.part(spec.model, 0)
    overlaps = spec.config.async_scheduling
    return Ranks(part, spec.sizes(), spec.identity, secret, spec.ways, overlaps, cores=cores)


def build_rank(
    spec: ShardSpec,
    rank: int,
    secret: bytes,
    leader: tuple[str, int],
    host: str = "",
    progress: Progress | None = None,
    on_fence: Callable[[str], None] | None = None,
    cores: Cores | None = None,
) -> Rank:
    """A rank that follows. See `worker.rank.Rank`."""
    part = spec.layout.part(spec.model, rank)
    runner = build_runner(spec, rank, progress)
    return Rank(part, runner, spec.sizes(), spec.identity, secret, leader, host, spec.ways, on_fence, cores=cores)


def build_model(
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    threads: int,
    progress: Progress | None = None,
    *,
    part: Part | None = None,
    deterministic: bool = False,
    device: torch.device = CPU,
    backend: ops.Backend | None = None,
) -> Model:
    """The native decoder where the kernels are native, a GPU's where they are a GPU's, else torch's on the reference.

    Args:
        part: what a rank of several holds; None is the whole model.
        backend: one for `device`; None chooses.

    Errors: ConfigError where `deterministic` or one of several ranks is asked of what cannot be either.
    """
    backend = backend or ops.backend_for(device)
    if isinstance(backend, Native):
        torch.set_num_threads(1)  # two teams of threads would fight for the cores
        return NativeModel(config, weights, dtype, backend, threads, progress, part=part, deterministic=deterministic)
    native, cure = "the native kernels", cpu.CURE
    if isinstance(backend, ops.PlannedBackend):
        native, cure = "the native kernels of CPUs", "run on the CPU (--device cpu)"
    if deterministic:
        raise ConfigError("deterministic", True, f"stand with {native}", f"{cure}, or leave it out")
    if part is not None and part.layout.num_ranks > 1:
        layout = part.layout
        field = "tensor_parallel_size" if layout.tensor > 1 else "pipeline_parallel_size"
        size = layout.tensor if layout.tensor > 1 else layout.pipeline
        raise ConfigError(field, size, f"be 1 without {native}", cure)
    if isinstance(backend, ops.PlannedBackend):
        if dtype not in backend.takes.kinds:
            kind = str(dtype).removeprefix("torch.")
            raise ConfigError("dtype", kind, f"be {backend.takes.rows} with {backend.name}", "or choose triton")
        try:
            return GpuModel(config, weights, dtype, backend, device, progress)
        except torch.OutOfMemoryError:
            raise ConfigError("model", "its weights", f"fit in what is free on {device}", "use a smaller one") from None
    torch.set_num_threads(threads)
    return Decoder(config, weights, dtype, progress)


def page_dtype(config: ShardConfig, dtype: str) -> torch.dtype:
    """Of keys and values, where weights have `dtype`."""
    kind: torch.dtype = getattr(torch, dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype)
    return kind


def page_identity(model: ModelConfig, config: ShardConfig, dtype: str) -> bytes:
    """What besides tokens decides K and V. Two shards of one model and these dtypes have the same."""
    return sha256(repr((model, dtype, page_dtype(config, dtype))).encode()).digest()
