"""A step split over tensor ranks, page groups and stages says what the whole one says; all ranks have equal bits."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kernels import cpu, int8
from kernels.decoder import Border, DecoderShape, LayerRows, MlpRows, NativeDecoder, Rows
from kernels.ops import Mask, PageList
from kernels.peers import BANDS, CallbackPeers, PeersBroken, Ring, SharedPeers

pytestmark = pytest.mark.skipif(not cpu.levels(), reason="the native kernels are not built")

WAIT = 120.0  # seconds; only a hang takes as long
MAX_TOKENS = 700


@dataclass(frozen=True)
class Sizes:
    hidden: int = 45
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 18
    intermediate: int = 83  # in units of 16, so ranks have unlike shares
    vocab: int = 131
    block_size: int = 4
    windows: tuple[int, ...] = (0, 21)  # by layer


@dataclass(frozen=True)
class Split:
    """tensor ranks in slices of groups, of the layers first .. end: of the last one's MLP the rows up to `cut`, and
    ahead of them the rows from `carried` on of the layer before. Between such two lies a `border`, piece by piece."""

    tensor: int = 1
    groups: int = 1
    first: int = 0
    end: int | None = None
    cut: int | None = None
    carried: int | None = None
    border: tuple[int, ...] = ()

    @property
    def layers(self) -> slice:
        return slice(self.first, self.end)

    @property
    def slices(self) -> int:
        return self.tensor // self.groups

    def units(self, rows: range, rank: int) -> slice:
        """A rank's share of rows of an MLP, dealt by 16."""
        count = -(-len(rows) // 16)
        begin, end = (min(count * edge // self.tensor * 16, len(rows)) for edge in (rank, rank + 1))
        return slice(rows.start + begin, rows.start + end)


class Weights:
    """Random weights, and the decoder of any part of them."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, seed: int = 0) -> None:
        self.sizes, self.dtype = sizes, dtype
        random = torch.Generator().manual_seed(seed)
        width, mlp, dim = sizes.hidden, sizes.intermediate, sizes.head_dim

        def matrix(rows: int, columns: int, scale: float = 1.5) -> torch.Tensor:
            return (torch.randn((rows, columns), generator=random) * scale / columns**0.5).to(dtype)

        def bias(rows: int) -> torch.Tensor:
            return (torch.randn(rows, generator=random) / 4).to(dtype)

        def norm(columns: int) -> torch.Tensor:
            return torch.rand(columns, generator=random) + 0.5

        self.layers = [
            {
                "q": matrix(sizes.heads * dim, width),
                "k": matrix(sizes.kv_heads * dim, width),
                "v": matrix(sizes.kv_heads * dim, width),
                "o": matrix(width, sizes.heads * dim),
                "gate": matrix(mlp, width),
                "up": matrix(mlp, width),
                "down": matrix(width, mlp),
                "q_bias": bias(sizes.heads * dim),
                "o_bias": bias(width),
                "gate_bias": bias(mlp),
                "down_bias": bias(width),
                "input_norm": norm(width),
                "mlp_norm": norm(width),
                "q_norm": norm(dim),
                "k_norm": norm(dim),
            }
            for _ in sizes.windows
        ]
        self.embedding, self.head, self.norm = matrix(sizes.vocab, width, 6.0), matrix(sizes.vocab, width), norm(width)
        self.frequencies = 1 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def kv_heads(self, split: Split, rank: int) -> range:
        at, count = rank // split.groups, self.sizes.kv_heads
        if count % split.slices:
            first = at * count // split.slices
            return range(first, first + 1)
        return range(at * count // split.slices, (at + 1) * count // split.slices)

    def vocabulary(self, split: Split, rank: int) -> slice:
        return slice(rank * self.sizes.vocab // split.tensor, (rank + 1) * self.sizes.vocab // split.tensor)

    def decoder(self, split: Split, rank: int, level: str, threads: int, deterministic: bool) -> NativeDecoder:
        sizes, dim = self.sizes, self.sizes.head_dim
        heads = range(rank * sizes.heads // split.tensor, (rank + 1) * sizes.heads // split.tensor)
        kv = self.kv_heads(split, rank)
        whole = split.units(range(sizes.intermediate), rank)
        own, own_kv = slice(heads.start * dim, heads.stop * dim), slice(kv.start * dim, kv.stop * dim)
        layers = self.layers[split.layers]
        windows = sizes.windows[split.layers]
        is_last = split.first + len(layers) == len(self.layers)
        shape = DecoderShape(
            sizes.hidden,
            len(heads),
            len(kv),
            dim,
            whole.stop - whole.start,
            sizes.vocab,
            1e-5,
            1.0,
            tuple(sorted(set(windows))),
            len(heads) * split.groups,
            split.cut is not None,
        )
        decoder = NativeDecoder(
            shape,
            self.dtype,
            None if split.first else self.embedding,
            self.norm if is_last else None,
            self.frequencies,
            cpu.Native(level),
            threads,
            deterministic=deterministic,
        )

        def summed(bias: torch.Tensor) -> torch.Tensor | None:
            return bias if rank == 0 else None

        def mlp(layer: dict[str, torch.Tensor], rows: slice, down_bias: torch.Tensor | None) -> MlpRows:
            return MlpRows(
                norm=layer["mlp_norm"],
                gate_up=Rows.paired(layer["gate"][rows], layer["up"][rows], layer["gate_bias"][rows], None),
                down=Rows.beside((layer["down"][:, rows].contiguous(),), (down_bias,)),
            )

        pieces = [slice(begin, end) for begin, end in pairwise(split.border)]
        if split.carried is not None:
            rest, before = split.units(range(split.carried, sizes.intermediate), rank), self.layers[split.first - 1]
            decoder.set_carried(mlp(before, rest, None), [mlp(before, piece, None) for piece in pieces])
        for index, (layer, window) in enumerate(zip(layers, windows, strict=True), 1):
            is_cut = split.cut is not None and index == len(layers)
            rows = split.units(range(split.cut or 0), rank) if is_cut else whole
            parts = (layer["q"][own], layer["k"][own_kv], layer["v"][own_kv])
            decoder.add_layer(
                LayerRows(
                    *(layer[name] for name in ("input_norm", "q_norm", "k_norm")),
                    qkv=Rows.beside(parts, (layer["q_bias"][own], None, None)),
                    o=Rows.beside((layer["o"][:, own].contiguous(),), (summed(layer["o_bias"]),)),
                    mlp=mlp(layer, rows, summed(layer["down_bias"])),
                    window=window,
                    border=[mlp(layer, piece, None) for piece in pieces] if is_cut else (),
                )
            )
        if is_last:
            decoder.set_head(Rows.beside((self.head[self.vocabulary(split, rank)],), (None,)))
        return decoder


@dataclass
class Chunk:
    """Tokens begin .. end of a sequence."""

    sequence: int
    begin: int
    end: int


@dataclass
class Book:
    """Where every page lies: (group, block), drawn when it is first asked for; alike on all ranks and stages."""

    groups: int
    blocks: int
    seed: int
    pages: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._free = [self._random.sample(range(self.blocks), self.blocks) for _ in range(self.groups)]

    def page(self, sequence: int, index: int) -> tuple[int, int]:
        if (sequence, index) not in self.pages:
            group = self._random.randrange(self.groups)
            self.pages[sequence, index] = (group, self._free[group].pop())
        return self.pages[sequence, index]

    def batch(self, chunks: Sequence[Chunk], sizes: Sizes, windows: Sequence[int], group: int) -> dict[str, Any]:
        """The arguments of `NativeDecoder.forward` for a group, but for the pool."""
        tokens, positions, slots, starts = [], [], [], [0]
        for chunk in chunks:
            for at in range(chunk.begin, chunk.end):
                where, block = self.page(chunk.sequence, at // sizes.block_size)
                slots.append(block * sizes.block_size + at % sizes.block_size if where == group else -1)
                tokens.append((at * 31 + chunk.sequence * 7 + at * at % 11) % sizes.vocab)
                positions.append(at)
            starts.append(len(tokens))
        first = torch.tensor([chunk.begin for chunk in chunks], dtype=torch.int32)
        lists = {}
        for window in windows:
            start, blocks, at = [0], [], []
            for chunk in chunks:
                seen = max(0, chunk.begin - window + 1) // sizes.block_size if window else 0
                for index in range(seen, -(-chunk.end // sizes.block_size)):
                    where, block = self.page(chunk.sequence, index)
                    if where == group:
                        blocks.append(block)
                        at.append(index * sizes.block_size)
                start.append(len(blocks))
            lists[window] = PageList(*(torch.tensor(each, dtype=torch.int32) for each in (start, blocks, at)))
        longs = (torch.tensor(each, dtype=torch.int64) for each in (tokens, positions, slots))
        query_start = torch.tensor(starts, dtype=torch.int32)
        named = dict(zip(("tokens", "positions", "slots", "query_start"), (*longs, query_start), strict=True))
        return named | {"pages": lists, "masks": {window: Mask(first, window) for window in windows}}


class Shard:
    """All tensor ranks of one stage, each with its decoder, its pages and its groups; a step runs in threads."""

    def __init__(
        self,
        weights: Weights,
        split: Split = Split(),
        *,
        level: str = cpu.levels()[-1] if cpu.levels() else "",
        threads: int = 1,
        deterministic: bool = False,
        quantized: bool = False,
        blocks: int = 200,
        seed: int = 1,
    ) -> None:
        self.weights, self.split, sizes = weights, split, weights.sizes
        self.book = Book(split.groups, blocks, seed)
        self.windows = tuple(sorted(set(sizes.windows[split.layers])))
        self.decoders, self.pools = [], []
        for rank in range(split.tensor):
            self.decoders.append(weights.decoder(split, rank, level, threads, deterministic))
            inner = (2, len(weights.kv_heads(split, rank)), sizes.block_size, sizes.head_dim)
            shape = (len(sizes.windows[split.layers]), blocks, *inner)
            if quantized:  # what nobody wrote has NaN for scales
                shape = (*shape[:-1], shape[-1] + int8.SCALE_BYTES)
                pool = torch.full(shape, -1, dtype=torch.int8)
            else:
                pool = torch.full(shape, torch.nan, dtype=weights.dtype)
            self.pools.append(pool)
        shape = self.decoders[0].shape
        self.tensor = group_of(split.tensor, shape.tensor_bytes(MAX_TOKENS))
        needed = shape.slice_bytes(MAX_TOKENS, weights.dtype)
        slices = [group_of(split.groups, needed) for _ in range(split.slices if needed else 0)]
        self.slice = [each for group in slices for each in group] or [None] * split.tensor
        self._threads = ThreadPoolExecutor(split.tensor)

    def step(self, chunks: Sequence[Chunk], hidden: torch.Tensor | None = None) -> torch.Tensor:
        """What the stage hands on, which all ranks must have with the same bits."""

        def run(rank: int) -> torch.Tensor:
            batch = self.book.batch(chunks, self.weights.sizes, self.windows, rank % self.split.groups)
            own = None if hidden is None else hidden.clone()
            groups = {"tensor": self.tensor[rank], "slice": self.slice[rank]}
            return self.decoders[rank].forward(**batch, pool=self.pools[rank], hidden=own, **groups)

        for chunk in chunks:  # draw all pages here, in one order
            for at in range(chunk.end):
                self.book.page(chunk.sequence, at // self.weights.sizes.block_size)
        found = [each.result(WAIT) for each in [self._threads.submit(run, rank) for rank in range(self.split.tensor)]]
        for each in found[1:]:
            assert torch.equal(each, found[0])
        return found[0]


class Pipeline:
    """Stages one after the other, each with pages of its own."""

    def __init__(self, weights: Weights, splits: Sequence[Split], seed: int = 1, **options: Any) -> None:
        self.stages = [Shard(weights, split, seed=seed + at, **options) for at, split in enumerate(splits)]

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        rows = None
        for stage in self.stages:
            rows = stage.step(chunks, rows)
        assert rows is not None
        return rows


def group_of(size: int, capacity: int) -> list[SharedPeers]:
    memory = mmap.mmap(-1, SharedPeers.num_bytes(size, capacity))
    found = [SharedPeers(memory, 0, rank, size, capacity) for rank in range(size)]
    for each in found:
        each.struct.reads_ahead = each.rank % 2  # it changes nothing but time
    return found


def story(seed: int, lengths: Sequence[int], most: int = 90) -> list[list[Chunk]]:
    """Random batches: chunks of prefills of unlike lengths beside decodes, until all sequences have their lengths."""
    draw = random.Random(seed)
    done = [0] * len(lengths)
    steps: list[list[Chunk]] = []
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        step = []
        for sequence, length in enumerate(lengths):
            if done[sequence] == length or draw.random() < 0.2:
                continue
            count = min(draw.choice((1, 1, 2, 7, 33, most)), length - done[sequence])
            step.append(Chunk(sequence, done[sequence], done[sequence] + count))
            done[sequence] += count
        draw.shuffle(step)
        if step:
            steps.append(step)
    return steps


SPLITS = [
    Split(tensor, groups) for tensor, groups in ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8))
]
NAMES = [f"T{each.tensor}G{each.groups}" for each in SPLITS]
LENGTHS = (170, 3, 96, 41, 1, 64)


def compare(
    weights: Weights, split: Split | Sequence[Split], steps: Sequence[Sequence[Chunk]], error: float, **options: Any
) -> list[torch.Tensor]:
    """Run a story on the whole model and on a split one, or on stages; the error is relative to the rows' size."""
    whole = Shard(weights, seed=5, **{name: value for name, value in options.items() if name != "threads"})
    parts = Pipeline(weights, [split] if isinstance(split, Split) else split, seed=6, **options)
    found = []
    for step in steps:
        expected, got = whole.step(step), parts.step(step)
        found.append(got)
        assert torch.isfinite(expected).all()
        assert (got - expected).abs().max() <= error * expected.abs().mean(), step
    return found


@pytest.mark.parametrize("split", SPLITS, ids=NAMES)
def test_a_split_step_says_what_the_whole_one_says(split: Split) -> None:
    weights = Weights(Sizes(), torch.float32)
    for seed, threads in ((1, 1), (2, 2)):
        compare(weights, split, story(seed, LENGTHS), 2e-5, threads=threads)


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
@pytest.mark.parametrize("split", [Split(4, 1), Split(4, 2), Split(4, 4)], ids=["T4G1", "T4G2", "T4G4"])
def test_any_number_of_kv_heads_can_be_split(split: Split, kv_heads: int) -> None:
    """Fewer than slices: they are replicated."""
    weights = Weights(Sizes(kv_heads=kv_heads, head_dim=32, block_size=16), torch.float32)
    compare(weights, split, story(3, LENGTHS), 2e-5)


@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize("quantized", [False, True], ids=["pages", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_every_kernel_can_be_split(level: str, quantized: bool, dtype: torch.dtype, deterministic: bool) -> None:
    """Direct rows, tiled rows and rows without a page here, of every dtype."""
    error = 0.2 if dtype == torch.bfloat16 else 0.05 if quantized else 2e-5  # a rounding that falls the other way
    options: dict[str, Any] = {"level": level, "quantized": quantized, "deterministic": deterministic}
    compare(Weights(Sizes(), dtype), Split(4, 2), story(4, LENGTHS[:4]), error, **options)


LONG = ((0, 420, 150), (0, 1, 200), (300, 1, 3), (64, 0, 1), (1, 193, 1), (580, 100, 20))  # tokens of three sequences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "splits",
    [
        [Split(2, 1)],
        [Split(4, 2)],
        [Split(8, 8)],
        [Split(2, 1, end=1, cut=32), Split(2, 1, first=1, carried=32)],
        [Split(4, 4, end=1, cut=80), Split(4, 4, first=1, carried=80)],
    ],
    ids=["T2G1", "T4G2", "T8G8", "T2P2", "T4G4P2"],
)
def test_sums_of_long_steps_go_by_bands(splits: list[Split], dtype: torch.dtype) -> None:
    """Whatever the bands, beside steps that have one, with teams whose bands are larger: the bits are the same."""
    weights = Weights(Sizes(intermediate=163), dtype)
    done, steps = [0, 0, 0], []
    for counts in LONG:
        steps.append([Chunk(i, done[i], done[i] + count) for i, count in enumerate(counts) if count])
        done = [at + count for at, count in zip(done, counts, strict=True)]

    def rows(bands: int, threads: int) -> list[torch.Tensor]:
        stages = Pipeline(weights, splits, threads=threads, blocks=600)
        for each in (peers for stage in stages.stages for peers in stage.tensor):
            assert each.struct.num_bands == BANDS
            each.struct.num_bands = bands
        return [stages.step(step) for step in steps]

    error = 0.2 if dtype == torch.bfloat16 else 2e-5
    compare(weights, splits, steps, error, blocks=600)
    whole = rows(0, 1)
    for bands, threads in ((BANDS, 1), (2, 1), (BANDS, 2)):
        for got, expected in zip(rows(bands, threads), whole, strict=True):
            assert torch.equal(got, expected)


def test_rows_far_longer_than_a_part_can_be_split() -> None:
    """Rows that are cut into parts on a rank are merged there first."""
    weights = Weights(Sizes(block_size=32, windows=(0,)), torch.float32)
    steps = [[Chunk(0, at, at + 350)] for at in range(0, 4900, 350)] + [[Chunk(0, 4900, 4901), Chunk(1, 0, 1)]]
    for deterministic in (False, True):
        compare(weights, Split(4, 4), steps, 2e-5, deterministic=deterministic)


@pytest.mark.parametrize(
    "splits",
    [[Split(2, 1)], [Split(4, 2)], [Split(4, 4)], [Split(2, 1, end=1, cut=32), Split(2, 1, first=1, carried=32)]],
    ids=["T2G1", "T4G2", "T4G4", "T2P2"],
)
def test_deterministic_rows_have_equal_bits_in_any_chunks(splits: list[Split]) -> None:
    """With pages dealt out alike, whatever the chunks and the threads."""
    weights = Weights(Sizes(), torch.bfloat16)

    def rows(chunk: int, threads: int) -> torch.Tensor:
        shard = Pipeline(weights, splits, threads=threads, deterministic=True)
        for stage in shard.stages:
            for index in range(60):  # the same dealing, before the steps draw it in their own order
                stage.book.page(0, index)
        return torch.cat([shard.step([Chunk(0, at, min(at + chunk, 150))]) for at in range(0, 150, chunk)])

    whole = rows(150, 1)
    for chunk, threads in ((1, 1), (7, 2), (64, 3)):
        assert torch.equal(rows(chunk, threads), whole)


@pytest.mark.parametrize("split", [Split(), Split(2, 1), Split(4, 4)], ids=["T1G1", "T2G1", "T4G4"])
def test_stages_hand_on_hidden_rows(split: Split) -> None:
    """Two stages, rows through a ring, have the bits of one; each stage has its own blocks for the same pages."""
    weights = Weights(Sizes(windows=(0, 21, 0)), torch.float32)
    whole = Shard(weights, split, seed=3)
    first = Shard(weights, replace(split, end=1), seed=3)
    last = Shard(weights, replace(split, first=1), seed=3)
    capacity = MAX_TOKENS * weights.sizes.hidden * 4
    memory = mmap.mmap(-1, Ring.num_bytes(2, capacity))
    producer, consumer = (Ring(memory, 0, 2, capacity) for _ in range(2))
    for number, step in enumerate(story(7, LENGTHS)):
        rows = first.step(step)
        message = producer.slot()[: rows.nbytes]
        message.view(torch.float32).view_as(rows).copy_(rows)
        producer.publish(number, rows.nbytes)
        tag, received = consumer.receive()
        assert tag == number
        got = last.step(step, received.view(torch.float32).view(len(rows), -1))
        consumer.release()
        assert torch.equal(got, whole.step(step))


# Stages of three layers that end inside MLPs of 83 rows: two and three, and those that take or hand on one array only.
CUTS = {
    "two": (Split(end=2, cut=32), Split(first=2, carried=32)),
    "three": (Split(end=1, cut=64), Split(first=1, end=2, carried=64, cut=32), Split(first=2, carried=32)),
    "one to two": (Split(end=1), Split(first=1, end=2, cut=32), Split(first=2, carried=32)),
    "two to one": (Split(end=1, cut=64), Split(first=1, end=2, carried=64), Split(first=2)),
}


def dealt(name: str, tensor: int, groups: int) -> list[Split]:
    return [replace(split, tensor=tensor, groups=groups) for split in CUTS[name]]


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize(("tensor", "groups"), [(1, 1), (2, 1), (2, 2)])
def test_stages_that_end_inside_an_mlp_say_what_one_says(name: str, tensor: int, groups: int) -> None:
    weights = Weights(Sizes(windows=(0, 21, 0)), torch.float32, seed=tensor)
    for seed, threads in ((1, 1), (2, 3)):
        steps = [*story(seed, LENGTHS), [Chunk(0, LENGTHS[0], LENGTHS[0] + 1)]]  # at last one token alone
        compare(weights, dealt(name, tensor, groups), steps, 2e-5, threads=threads)


@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_every_kernel_can_end_inside_an_mlp(level: str, dtype: torch.dtype, deterministic: bool) -> None:
    error = 0.2 if dtype == torch.bfloat16 else 2e-5  # a rounding that falls the other way
    weights = Weights(Sizes(windows=(0, 21, 0)), dtype)
    for tensor in (1, 2):
        splits = dealt("three", tensor, 1)
        compare(weights, splits, story(4, LENGTHS[:4]), error, level=level, deterministic=deterministic)


def test_what_a_cut_stage_hands_on_is_the_stream_before_its_mlp_and_the_sums_of_its_units() -> None:
    """Together with the sums of the other units they are the stream behind it; the two arrays have one layout."""
    weights = Weights(Sizes(), torch.float32)
    chunks = [Chunk(0, 0, 13), Chunk(1, 0, 1)]
    handed = {cut: Shard(weights, Split(cut=cut)).step(chunks) for cut in (16, 48)}
    assert all(each.shape == (2, 14, 45) for each in handed.values())
    assert torch.equal(handed[16][0], handed[48][0])
    whole = Shard(weights).step(chunks)
    assert not torch.allclose(handed[48].sum(0), whole, atol=0.1)
    layer = weights.layers[1]
    stream = handed[48][0]
    x = stream * (stream.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer["mlp_norm"]
    units = torch.nn.functional.silu(x @ layer["gate"].T + layer["gate_bias"]) * (x @ layer["up"].T)
    for cut, (_, sums) in handed.items():
        torch.testing.assert_close(sums, units[:, :cut] @ layer["down"][:, :cut].T + layer["down_bias"])
    torch.testing.assert_close(stream + units @ layer["down"].T + layer["down_bias"], whole)


def test_given_hidden_rows_are_changed_in_place() -> None:
    weights = Weights(Sizes(), torch.float32)
    last = Shard(weights, Split(first=1))
    batch = last.book.batch([Chunk(0, 0, 5)], weights.sizes, last.windows, 0)
    rows = torch.ones(5, weights.sizes.hidden)
    batch["tokens"].fill_(-1)  # not read
    found = last.decoders[0].forward(**batch, pool=last.pools[0], hidden=rows)
    assert found is rows and not torch.equal(rows, torch.ones_like(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_of_a_border_are_done_on_either_side_with_the_same_bits(threads: int, dtype: torch.dtype) -> None:
    weights, edges = Weights(Sizes(), dtype), (16, 32, 48, 80)
    for chunks in ([Chunk(0, 0, 3)], [Chunk(0, 0, 70), Chunk(1, 0, 1)]):
        whole = Shard(weights).step(chunks)
        found = []
        for made in range(4):
            first = Shard(weights, Split(end=1, cut=16, border=edges), threads=threads)
            last = Shard(weights, Split(first=1, carried=80, border=edges), threads=threads)
            border = Border(most=made)
            batches = [each.book.batch(chunks, weights.sizes, each.windows, 0) for each in (first, last)]
            handed = first.decoders[0].forward(**batches[0], pool=first.pools[0], border=border)
            assert border.made.value == made
            more = {"hidden": handed, "border": Border(given=made)}
            found.append(last.decoders[0].forward(**batches[1], pool=last.pools[0], **more).clone())
            assert torch.equal(found[-1], found[0])
        error = 2e-5 if dtype is torch.float32 else 2e-2
        assert (found[0] - whole).abs().max() <= error * whole.abs().mean()
        with pytest.raises(ValueError, match="border: got 4 pieces, must be from 0 to 3"):
            last.decoders[0].forward(**batches[1], pool=last.pools[0], hidden=handed, border=Border(given=4))


def test_a_stage_leaves_what_it_can_to_one_that_waits() -> None:
    weights, chunks = Weights(Sizes(), torch.float32), [Chunk(0, 0, 3)]
    first = Shard(weights, Split(end=1, cut=16, border=(16, 32, 48, 80)))
    batch = first.book.batch(chunks, weights.sizes, first.windows, 0)
    memory = mmap.mmap(-1, Ring.num_bytes(3, 64))
    to, at = Ring(memory, 0, 3, 64), Ring(memory, 0, 3, 64)

    def made(most: int = 3) -> int:
        border = Border(most=most, behind=to)
        first.decoders[0].forward(**batch, pool=first.pools[0], border=border)
        return border.made.value

    assert made() == 0
    for number in range(2):
        to.put(number, b"")
    assert (made(), made(2), made(9)) == (3, 2, 3)
    at.take()
    assert made() == 3  # it has one more to do
    at.take()
    assert made() == 0


@pytest.mark.parametrize("cut", [0, 16])
def test_a_first_stage_writes_where_it_is_told(cut: int) -> None:
    weights = Weights(Sizes(), torch.float32)
    chunks = [Chunk(0, 0, 5), Chunk(1, 0, 2)]
    usual = Shard(weights, Split(end=1, cut=cut)).step(chunks)
    first = Shard(weights, Split(end=1, cut=cut))
    batch = first.book.batch(chunks, weights.sizes, first.windows, 0)
    out = torch.full_like(usual, torch.nan)
    assert first.decoders[0].forward(**batch, pool=first.pools[0], out=out) is out
    assert torch.equal(out, usual)
    for bad in (torch.zeros(7, 44), out[..., :-1].contiguous(), out.double()):
        with pytest.raises(ValueError, match=r"out: got .* must be float32 \(.*7, 45\), contiguous"):
            first.decoders[0].forward(**batch, pool=first.pools[0], out=bad)


def test_rows_that_are_not_there_have_no_head() -> None:
    weights = Weights(Sizes(), torch.float32)
    decoder, hidden = Shard(weights).decoders[0], torch.randn(9, weights.sizes.hidden)
    for rows in ([0, 9], [-1, 3]):
        with pytest.raises(ValueError, match=f"rows: got {min(rows)} to {max(rows)}, must be from 0 to 8"):
            decoder.head(hidden, np.array(rows), logits=False)
    assert not len(decoder.head(hidden, np.zeros(0, np.int64), logits=False).tokens)


def test_what_a_head_says_stays_when_it_is_asked_again() -> None:
    weights = Weights(Sizes(), torch.float32)
    decoder, hidden = Shard(weights).decoders[0], torch.randn(40, weights.sizes.hidden)
    first = decoder.head(hidden, np.arange(40), logits=False)
    again = decoder.head(hidden, np.arange(40)[::-1].copy(), logits=False)
    np.testing.assert_array_equal(first.tokens, again.tokens[::-1])
    np.testing.assert_array_equal(first.values, again.values[::-1])
    assert len(set(first.values.tolist())) > 1


def test_a_split_head_has_the_logits_of_the_whole() -> None:
    weights = Weights(Sizes(), torch.float32)
    hidden = torch.randn(9, weights.sizes.hidden, generator=torch.Generator().manual_seed(1))
    picked = np.array([8, 0, 3, 3])
    whole = Shard(weights).decoders[0].head(hidden, picked, logits=True)
    parts = [each.head(hidden, picked, logits=True) for each in Shard(weights, Split(4, 1)).decoders]
    logits = [each.logits for each in parts if each.logits is not None]
    assert whole.logits is not None and torch.equal(torch.cat(logits, 1), whole.logits)
    best = np.argmax([each.values for each in parts], 0)
    first = np.array([weights.vocabulary(Split(4, 1), rank).start for rank in range(4)])
    found = np.stack([each.tokens for each in parts])[best, range(4)] + first[best]
    np.testing.assert_array_equal(found, whole.tokens)
    np.testing.assert_allclose(sum(each.totals for each in parts), whole.totals, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tensor", "slice"])
def test_a_step_too_large_for_its_group_changes_nothing(name: str) -> None:
    weights = Weights(Sizes(), torch.float32)
    shard = Shard(weights, Split(2, 2))
    shape = shard.decoders[0].shape
    needed = shape.tensor_bytes(1) if name == "tensor" else shape.slice_bytes(1, torch.float32)
    small = group_of(2, 10 * needed + 1)[0]
    groups = {"tensor": shard.tensor[0], "slice": shard.slice[0]} | {name: small}
    batch = shard.book.batch([Chunk(0, 0, 11)], weights.sizes, shard.windows, 0)
    before = shard.pools[0].clone()
    words = (
        f"^{name}: a step of 11 tokens exchanges {11 * needed} bytes, its regions hold {10 * needed + 1}; .* 10 tokens$"
    )
    with pytest.raises(ValueError, match=words):
        shard.decoders[0].forward(**batch, pool=shard.pools[0], **groups)
    assert torch.equal(shard.pools[0].view(torch.int32), before.view(torch.int32))
    assert [each.struct.turn for each in groups.values()] == [0, 0]


def test_a_stage_says_what_it_lacks() -> None:
    weights = Weights(Sizes(), torch.float32)
    first, last = (Shard(weights, each) for each in (Split(end=1), Split(first=1)))
    with pytest.raises(ValueError, match="head: this decoder has no norm and head"):
        first.decoders[0].head(torch.zeros(1, 45), np.zeros(1, np.int64), logits=False)
    batch = last.book.batch([Chunk(0, 0, 1)], weights.sizes, last.windows, 0)
    with pytest.raises(ValueError, match="hidden: got none"):
        last.decoders[0].forward(**batch, pool=last.pools[0])
    for bad in (torch.zeros(2, 45), torch.zeros(1, 45, dtype=torch.float64), torch.zeros(1, 90)[:, ::2]):
        with pytest.raises(ValueError, match=r"hidden: got .* must be float32 \(1, 45\), contiguous"):
            last.decoders[0].forward(**batch, pool=last.pools[0], hidden=bad)
    carrying = Shard(weights, Split(first=1, carried=32)).decoders[0]
    with pytest.raises(ValueError, match=r"hidden: got .* \(1, 45\) .* must be float32 \(2, 1, 45\), contiguous"):
        carrying.forward(**batch, pool=last.pools[0], hidden=torch.zeros(1, 45))


def test_groups_must_be_those_of_the_shape() -> None:
    weights = Weights(Sizes(), torch.float32)
    shard = Shard(weights, Split(4, 4))
    batch = shard.book.batch([Chunk(0, 0, 1)], weights.sizes, shard.windows, 0)
    for groups, got in ((None, "none"), (group_of(2, 10**6)[0], "2 ranks")):
        with pytest.raises(ValueError, match=f"slice: got {got}, must be the 4 groups of the shape"):
            shard.decoders[0].forward(**batch, pool=shard.pools[0], slice=groups)
    with pytest.raises(ValueError, match="attended_heads: got 5, must be a multiple of the 2 q_heads"):
        DecoderShape(8, 2, 1, 8, 16, 9, 1e-5, 1.0, (0,), 5)


@pytest.mark.parametrize(
    ("split", "fails_at"),
    [
        *((Split(2, 2), at) for at in range(1, 9)),
        *((Split(2, 2, first=1, cut=48, carried=32), at) for at in range(1, 6)),
    ],
    ids=[*(f"layers-{at}" for at in range(1, 9)), *(f"carried-{at}" for at in range(1, 6))],
)
def test_a_broken_exchange_ends_the_step(split: Split, fails_at: int) -> None:
    """At each of the four exchanges of each layer, and at that of a carried MLP; with a team, which is whole again for
    the next step."""
    weights = Weights(Sizes(), torch.float32)
    shard = Shard(weights, split, threads=3)
    calls: list[int] = []

    def gather(regions: list[torch.Tensor], rank: int) -> None:
        calls.append(rank)
        if len(calls) == fails_at:
            raise ConnectionError("the cable is cut")
        regions[1 - rank].copy_(regions[rank])

    def forward(function: Callable[[list[torch.Tensor], int], None]) -> torch.Tensor:
        groups = {name: CallbackPeers(0, 2, 10**6, function) for name in ("tensor", "slice")}
        batch = shard.book.batch([Chunk(0, 0, 20)], weights.sizes, shard.windows, 0)
        hidden = torch.ones(2, 20, weights.sizes.hidden) if split.first else None
        return shard.decoders[0].forward(**batch, pool=shard.pools[0], hidden=hidden, **groups)

    with pytest.raises(PeersBroken) as raised:
        forward(gather)
    assert isinstance(raised.value.__cause__, ConnectionError)
    assert len(calls) == fails_at
    fails_at = 0
    assert torch.isfinite(forward(gather)).all()


@pytest.mark.parametrize("num_tokens", [20, 500], ids=["turn", "band"])
def test_an_abort_ends_a_step_that_waits(num_tokens: int) -> None:
    weights = Weights(Sizes(), torch.float32)
    shard = Shard(weights, Split(2, 1), threads=2)
    batch = shard.book.batch([Chunk(0, 0, num_tokens)], weights.sizes, shard.windows, 0)
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(shard.decoders[0].forward, **batch, pool=shard.pools[0], tensor=shard.tensor[0])
        with pytest.raises(TimeoutError):
            done.result(0.2)
        shard.tensor[1].abort()
        with pytest.raises(PeersBroken, match="2 ranks"):
            done.result(WAIT)
