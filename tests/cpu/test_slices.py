"""What a rank of several reads, holds and computes: slices of tensors, packed; and all ranks together are the model."""

from __future__ import annotations

import ctypes
import json
import mmap
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kernels import cpu
from kernels.cpu import CURE, Native
from kernels.decoder import HALF_PANEL, PANEL, DecoderShape, NativeDecoder, Rows
from kernels.peers import Peers, SharedPeers
from kernels.reference import Reference
from pagetable.errors import ConfigError
from pagetable.ids import PlanNumber
from tests.models import make_model
from tests.rank_lab import make_spec
from worker import layout as layout_module
from worker import shard
from worker.kv_cache import PagedKVCache
from worker.layout import Layout, Part
from worker.model_config import ModelConfig
from worker.native_model import NativeModel
from worker.plan import Plan, by_column
from worker.tables import TableMirror
from worker.weights import SINGLE_FILE, open_weights

native = pytest.mark.skipif(not cpu.levels(), reason="the native kernels are not built")
DTYPES = [torch.float32, torch.bfloat16]
HEADS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 150,
    "num_hidden_layers": 3,
}


class TestTensors:
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("wanted", DTYPES)
    def test_a_slice_equals_that_of_the_whole(self, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
        saved = torch.randn(37, 29).to(stored)
        save_file({"w": saved, "b": saved[:, 0].contiguous()}, tmp_path / SINGLE_FILE)
        weights = open_weights(tmp_path)
        draw = random.Random(3)
        for _ in range(100):
            rows, columns = (range(*sorted(draw.choices(range(size + 1), k=2))) for size in saved.shape)
            part = saved[rows.start : rows.stop]
            for cut in (None, columns):
                expected = part if cut is None else part[:, cut.start : cut.stop]
                assert torch.equal(weights.tensor("w", wanted, rows, cut), expected.to(wanted))
            assert torch.equal(weights.tensor("b", wanted, rows), saved[rows.start : rows.stop, 0].to(wanted))
            assert torch.equal(
                weights.tensor("w", wanted, None, columns), saved[:, columns.start : columns.stop].to(wanted)
            )

    def test_a_slice_of_its_own_dtype_is_the_file_itself(self, tmp_path: Path) -> None:
        save_file({"w": torch.zeros(8, 6)}, tmp_path / SINGLE_FILE)
        weights = open_weights(tmp_path)
        whole = weights.tensor("w", torch.float32)
        part = weights.tensor("w", torch.float32, range(2, 5), range(1, 4))
        assert part.data_ptr() == whole[2, 1:].data_ptr() and part.stride() == (6, 1)

    def test_only_the_slice_is_converted(self, tmp_path: Path) -> None:
        save_file({"w": torch.zeros(64, 48)}, tmp_path / SINGLE_FILE)
        weights = open_weights(tmp_path)
        for rows, columns in ((range(8, 24), None), (None, range(8, 24)), (range(8, 24), range(1, 2))):
            part = weights.tensor("w", torch.bfloat16, rows, columns)
            assert part.untyped_storage().nbytes() == part.numel() * 2

    def test_only_its_rows_are_mapped(self, tmp_path: Path) -> None:
        path = tmp_path / SINGLE_FILE
        save_file({"w": torch.zeros(8192, 1024)}, path)
        weights = open_weights(tmp_path)
        part = weights.tensor("w", torch.float32, range(1024, 2048))
        assert part.sum() == 0
        resident, here = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split(" ")[0]:
                here = line.endswith(str(path))
            elif here and line.startswith("Rss:"):
                resident += int(line.split()[1]) << 10
        # the kernel maps whole folios of the page cache, up to 2 MiB; the file has 32
        assert 4 << 20 <= resident <= (4 << 20) + 2 * (2 << 20)

    def test_unaligned_rows_are_read_right(self, tmp_path: Path) -> None:
        values = torch.arange(12.0).view(4, 3)
        header = {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "w": {"dtype": "F32", "shape": [4, 3], "data_offsets": [1, 49]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + b"\x07" + values.numpy().tobytes())
        found = open_weights(tmp_path).tensor("w", torch.float32, range(1, 4), range(1, 3))
        assert torch.equal(found, values[1:4, 1:3])

    @pytest.mark.parametrize(
        ("rows", "columns", "text"),
        [
            (range(9), None, r"w: rows: got range\(0, 9\), must be a run within the 8 of shape \[8, 6\]"),
            (range(-1, 2), None, r"w: rows: got range\(-1, 2\)"),
            (range(0, 4, 2), None, r"w: rows: got range\(0, 4, 2\)"),
            (None, range(3, 7), r"w: columns: got range\(3, 7\), must be a run within the 6 of shape \[8, 6\]"),
        ],
    )
    def test_a_slice_that_is_not_there(
        self, tmp_path: Path, rows: range | None, columns: range | None, text: str
    ) -> None:
        save_file({"w": torch.zeros(8, 6)}, tmp_path / SINGLE_FILE)
        with pytest.raises(ValueError, match=text):
            open_weights(tmp_path).tensor("w", torch.float32, rows, columns)

    def test_columns_of_a_vector(self, tmp_path: Path) -> None:
        save_file({"b": torch.zeros(8)}, tmp_path / SINGLE_FILE)
        with pytest.raises(
            ValueError, match=r"b: columns: got range\(0, 1\), must be a run within the 0 of shape \[8\]"
        ):
            open_weights(tmp_path).tensor("b", torch.float32, None, range(1))


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [range(7), range(3, 10), range(4, 5), range(2, 46), range(47)])
def test_packed_columns_equal_those_of_a_copy(dtype: torch.dtype, columns: range) -> None:
    shape = DecoderShape(64, 2, 2, 16, 32, 10, 1e-6, 1.0, (0,))
    decoder = NativeDecoder(shape, dtype, None, None, torch.ones(8, dtype=torch.float64), Native(cpu.levels()[0]), 2)
    whole = torch.randn(70, 47).to(dtype)
    part = whole[:, columns.start : columns.stop]
    packed = []
    for weight in (part, part.contiguous()):
        (matrix,) = decoder._pack((Rows.beside((weight, weight[:9]), (None, None)),))
        size = -(-79 // PANEL) * PANEL * matrix.depth * 4
        packed.append(ctypes.string_at(matrix.packed, size))
    assert packed[0] == packed[1] and any(packed[0])


def test_the_pure_layout_knows_the_kernels_sizes() -> None:
    assert (layout_module.PANEL, layout_module.MLP_UNIT) == (PANEL, HALF_PANEL)


class Calls:
    """What a progress function was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))


@dataclass
class Ranks:
    """All ranks of a shard in one process, with pages dealt to groups at random, and stages run one after the other."""

    layout: Layout
    models: list[NativeModel]
    caches: list[PagedKVCache]
    tables: list[TableMirror]
    tensor: list[Peers | None]
    slices: list[Peers | None]
    free: dict[tuple[int, int], list[int]]
    draw: random.Random
    num_pages: dict[int, int]

    @classmethod
    def make(cls, folder: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> Ranks:
        config = ModelConfig.from_folder(folder)
        parts = layout.parts(config)
        models = [
            NativeModel(config, open_weights(folder), dtype, Native(cpu.levels()[-1]), 1, part=part) for part in parts
        ]
        draw = random.Random(8)
        caches, tables = [], []
        for part in parts:
            cache = PagedKVCache(config, 40, 4, dtype, part)
            cache.pool.view(torch.int16).fill_(-1)  # NaN: pages that are not written reach no result
            caches.append(cache)
            tables.append(TableMirror(4, 64, 4, part.stage, part.group if layout.page > 1 else None))
        free = {
            (stage, group): draw.sample(range(40), 40)
            for stage in range(layout.pipeline)
            for group in range(layout.page)
        }
        tensor = peers_of(parts, lambda part: part.tensor_peers)
        slices = peers_of(parts, lambda part: part.slice_peers)
        return cls(layout, models, caches, tables, tensor, slices, free, draw, {})

    def plan(self, rows: list[tuple[int, int, list[int]]]) -> Plan:
        plan = Plan(PlanNumber(0), table_blocks=by_column(self.layout.pipeline))
        for slot, first, tokens in rows:
            need = -(-(first + len(tokens)) // 4)
            for index in range(self.num_pages.get(slot, 0), need):
                group = self.draw.randrange(self.layout.page)
                plan.table_slot.append(slot)
                plan.table_index.append(index)
                plan.table_group.append(group)
                for stage, blocks in enumerate(plan.table_blocks):
                    blocks.append(self.free[stage, group].pop())
            self.num_pages[slot] = need
            plan.slots.append(slot)
            plan.first_position.append(first)
            plan.tokens.extend(tokens)
            plan.query_start.append(len(plan.tokens))
        return plan

    def logits(self, rows: list[tuple[int, int, list[int]]]) -> torch.Tensor:
        """Of every token over the whole vocabulary; what the ranks say of the best must agree with them."""
        plan = self.plan(rows)
        hidden: list[torch.Tensor] | None = None
        with ThreadPoolExecutor(self.layout.tensor) as threads:
            for stage in range(self.layout.pipeline):
                ranks = range(stage * self.layout.tensor, (stage + 1) * self.layout.tensor)
                given = [None] * len(ranks) if hidden is None else [each.clone() for each in hidden]
                hidden = list(threads.map(lambda rank, x: self._step(rank, plan, x), ranks, given))
                assert all(torch.equal(each, hidden[0]) for each in hidden)
        assert hidden is not None
        chosen = np.arange(len(plan.tokens))
        heads = [model.head(hidden[0], chosen, logits=True) for model in self.models[-self.layout.tensor :]]
        found = torch.cat([head.logits for head in heads if head.logits is not None], 1)
        owner = np.argmax([head.values for head in heads], 0)
        tokens = [int(heads[rank].tokens[row]) for row, rank in enumerate(owner)]
        assert tokens == found.argmax(-1).tolist()
        return found

    def _step(self, rank: int, plan: Plan, hidden: torch.Tensor | None) -> torch.Tensor:
        tables, model = self.tables[rank], self.models[rank]
        try:
            tables.apply(plan)
            batch = tables.batch(plan, model.windows)
            return model.forward(batch, self.caches[rank], hidden, tensor=self.tensor[rank], slice=self.slices[rank])
        except BaseException:
            for peers in (*self.tensor, *self.slices):
                if peers is not None:
                    peers.abort()  # or the others wait for ever
            raise


def peers_of(parts: tuple[Part, ...], ranks: Callable[[Part], range]) -> list[Peers | None]:
    """For each rank its view of its group, each group in memory of its own; None where it is alone."""
    capacity = 1 << 18
    memories: dict[range, mmap.mmap] = {}
    found: list[Peers | None] = []
    for part in parts:
        group = ranks(part)
        memory = memories.setdefault(group, mmap.mmap(-1, SharedPeers.num_bytes(len(group), capacity)))
        alone = len(group) == 1
        found.append(None if alone else SharedPeers(memory, 0, group.index(part.rank), len(group), capacity))
    return found


def run(ranks: Ranks, vocab: int) -> torch.Tensor:
    """Logits of two prompts in chunks beside decodes, over a few dozen pages."""
    draw = random.Random(4)
    a, b = ([draw.randrange(vocab) for _ in range(size)] for size in (45, 31))
    steps = [[(0, 0, a[:17])], [(0, 17, a[17:40]), (1, 0, b[:9])], [(1, 9, b[9:30]), (0, 40, a[40:41])]]
    steps += [[(1, 30, b[30:31]), (0, 41, a[41:42])], [(0, 42, a[42:45])]]
    return torch.cat([ranks.logits(rows) for rows in steps])


_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": ("llama", HEADS | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", HEADS | {"tie_word_embeddings": True, "intermediate_size": 97}),
    "qwen2-windows": ("qwen2", HEADS | {"num_attention_heads": 6, "hidden_size": 96} | _WINDOWS),
    "qwen3": ("qwen3", HEADS | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}),
    "qwen3-four": (
        "qwen3",
        HEADS | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "num_hidden_layers": 4},
    ),
}
_CASES = [
    *(("llama-biases", sizes) for sizes in ((2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 1, 2), (4, 2, 2), (8, 1, 4))),
    *(("llama-tied", sizes) for sizes in ((1, 3, 1), (2, 2, 1), (4, 1, 4))),
    *(("qwen2-windows", sizes) for sizes in ((2, 3, 2), (3, 1, 3), (6, 2, 3))),
    *(("qwen3", sizes) for sizes in ((3, 1, 1), (3, 3, 3))),
    # stages that end inside MLPs, as do those of llama-biases (4, 2, 2) and of llama-tied (2, 2, 1)
    *(("llama-biases", sizes) for sizes in ((1, 2, 1), (2, 2, 1))),
    *(("qwen2-windows", sizes) for sizes in ((1, 2, 1), (2, 2, 2))),
    *(("qwen3-four", sizes) for sizes in ((1, 3, 1), (3, 3, 3))),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            arch, fields = _MODELS[name]
            made[name] = make_model(tmp_path_factory.mktemp(name), arch, seed=6, **fields)
        return made[name]

    return folder


@native
class TestRanks:
    @pytest.mark.parametrize(("name", "sizes"), _CASES, ids=lambda value: str(value).replace(" ", ""))
    @torch.inference_mode()
    def test_all_ranks_together_are_the_model(
        self, folders: Callable[[str], Path], name: str, sizes: tuple[int, int, int]
    ) -> None:
        folder = folders(name)
        expected = run(Ranks.make(folder, Layout()), 331)
        found = run(Ranks.make(folder, Layout(*sizes)), 331)
        assert expected.std() > 1.0
        assert (found - expected).abs().max() < 1e-4

    @pytest.mark.parametrize("sizes", [(2, 1, 1), (4, 2, 2), (1, 2, 1), (2, 2, 1)])
    @torch.inference_mode()
    def test_in_bfloat16_they_differ_by_rounding(
        self, folders: Callable[[str], Path], sizes: tuple[int, int, int]
    ) -> None:
        """With an odd number of columns of `down` on the last rank."""
        folder = folders("llama-tied")
        whole = run(Ranks.make(folder, Layout()), 331)
        rounding = (run(Ranks.make(folder, Layout(), torch.bfloat16), 331) - whole).abs().mean()
        error = (run(Ranks.make(folder, Layout(*sizes), torch.bfloat16), 331) - whole).abs().mean()
        assert 0 < error < 1.5 * rounding

    def test_memory_is_what_the_layout_says(self, folders: Callable[[str], Path]) -> None:
        cut = set()
        for name, sizes in _CASES:
            config = ModelConfig.from_folder(folders(name))
            if any(part.is_cut for part in Layout(*sizes).parts(config)):
                cut.add((name, sizes))
            for dtype in DTYPES:
                for part in Layout(*sizes).parts(config):
                    weights = open_weights(folders(name))
                    decoder = NativeModel(config, weights, dtype, Native(cpu.levels()[0]), 1, part=part).decoder
                    taken = sum(len(each) if isinstance(each, mmap.mmap) else each.nbytes for each in decoder._keep)
                    assert taken - config.head_dim // 2 * 8 == part.weight_bytes(config, dtype.itemsize)
        assert cut == {*_CASES[-6:], ("llama-biases", (4, 2, 2)), ("llama-tied", (2, 2, 1))}

    def test_progress_counts_the_ranks_own_bytes(self, folders: Callable[[str], Path]) -> None:
        folder = folders("llama-biases")
        config = ModelConfig.from_folder(folder)
        backend = Native(cpu.levels()[0])
        for part in (*Layout(4, 2, 2).parts(config), *Layout(2, 2).parts(config)):
            weights, calls = open_weights(folder), Calls()
            NativeModel(config, weights, torch.float32, backend, 1, calls, part=part)
            expected = sum(
                weights.tensor(name, torch.float32, cut.rows, cut.columns).nbytes
                for name, cut in part.tensors(config).items()
            )
            assert calls.seen[-1] == (expected, expected)
            assert [done for done, _ in calls.seen] == sorted(done for done, _ in calls.seen)
            assert len(calls.seen) == len(part.tensors(config))

    def test_windows_are_those_of_the_stage(self, folders: Callable[[str], Path]) -> None:
        folder = folders("qwen2-windows")
        config = ModelConfig.from_folder(folder)
        assert config.windows == (0, 9, 9)
        found = [
            NativeModel(config, open_weights(folder), torch.float32, Native(cpu.levels()[0]), 1, part=part).windows
            for part in Layout(1, 3).parts(config)
        ]
        assert found == [(0,), (9,), (9,)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_a_rank_has_pages_of_its_layers_and_heads(tmp_path: Path, dtype: torch.dtype) -> None:
    config = ModelConfig.from_folder(make_model(tmp_path, **HEADS))
    row = 16 * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    for part in Layout(4, 2, 2).parts(config):
        cache = PagedKVCache(config, 6, 4, dtype, part)
        assert cache.pool.shape == (len(part.layers), 6, 2, 1, 4, row // dtype.itemsize)
        assert cache.pool.nbytes == 6 * part.block_bytes(4, PagedKVCache.row_bytes(config, dtype))
        assert PagedKVCache.bytes_per_block(config, 4, dtype, part) * 6 == cache.pool.nbytes
    assert PagedKVCache.bytes_per_block(config, 4, dtype) == 2 * 3 * 2 * 4 * row


def test_stages_hand_on_twice_the_rows_where_one_ends_inside_an_mlp(tmp_path: Path) -> None:
    make_model(tmp_path, **HEADS)
    for layout, arrays in ((Layout(1, 2), 2), (Layout(4, 2, 2), 2), (Layout(1, 3), 1)):
        spec = make_spec(tmp_path, layout, max_num_batched_tokens=100, block_size=8)
        assert any(part.is_cut for part in layout.parts(spec.model)) == (arrays == 2)
        assert spec.sizes().ring == arrays * 108 * 64 * 4


_LOAD = """
import ctypes, json, sys
import torch
from kernels import cpu
from pathlib import Path
from worker.layout import Layout
from worker.model_config import ModelConfig
from worker.native_model import NativeModel
from worker.weights import open_weights

def anonymous():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10

folder, tensor, pipeline, page, rank, dtype = sys.argv[1], *map(int, sys.argv[2:6]), getattr(torch, sys.argv[6])
config = ModelConfig.from_folder(folder)
part = Layout(tensor, pipeline, page).part(config, rank)
backend = cpu.Native(cpu.levels()[0])
torch.zeros(8).to(torch.bfloat16).sum()
weights, seen = open_weights(folder), [anonymous()]
model = NativeModel(config, weights, dtype, backend, 1, lambda *_: seen.append(anonymous()), part=part)
seen.append(anonymous())
ctypes.CDLL(None).malloc_trim(0)  # what was freed and malloc kept is not held
seen.append(anonymous())
print(json.dumps([max(seen) - seen[0], seen[-1] - seen[0], part.weight_bytes(config, dtype.itemsize)]))
"""


@native
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc/self/smaps_rollup on this system")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path, dtype: str) -> None:
    """A model of 75 MB in bfloat16: what the first and the last of four ranks have while they load and afterwards."""
    fields = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 5, "vocab_size": 4096}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 64}
    folder = make_model(tmp_path, dtype="bfloat16", **fields, **heads)
    config = ModelConfig.from_folder(folder)
    item = 2 if dtype == "bfloat16" else 4
    whole = Layout().part(config, 0).weight_bytes(config, item)
    for part in Layout(2, 2, 1).parts(config)[::3]:
        arguments = [sys.executable, "-c", _LOAD, str(folder), "2", "2", "1", str(part.rank), dtype]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        most, after, weights = json.loads(done.stdout)
        mapped = 4096 * 768 * 2 if part.is_first and dtype == "bfloat16" else 0  # the embedding where it lies
        # a change of dtype passes through one layer's or the head's slice at a time
        layer = max(12 * 64 * 2 * 768 + 6 * 64 * 2 * 768 + 3 * 2048 * 768, 4096 * 768) // 2
        passing = 2 * layer * 4 if dtype == "float32" else 0  # twice, since malloc keeps some of what was freed
        slack = 3 << 20
        assert weights < 0.4 * whole
        assert abs(after - (weights - mapped)) < slack
        assert most < weights - mapped + passing + slack < 0.7 * whole


def test_torchs_decoder_is_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_folder(make_model(tmp_path, **HEADS))
    monkeypatch.setattr(shard.ops, "default_backend", Reference)
    threads = torch.get_num_threads()
    for layout, field in ((Layout(2), "tensor_parallel_size"), (Layout(1, 2), "pipeline_parallel_size")):
        with pytest.raises(ConfigError) as caught:
            shard.build_model(config, open_weights(tmp_path), torch.float32, 1, part=layout.part(config, 0))
        assert str(caught.value) == f"{field}: got 2, must be 1 without the native kernels; {CURE}"
    whole = shard.build_model(config, open_weights(tmp_path), torch.float32, threads, part=Layout().part(config, 0))
    assert type(whole).__name__ == "Decoder"
