"""How ranks divide a model: every tensor is dealt out once or copied as stated; refusals name what is possible."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from pagetable.errors import ConfigError
from worker.fields import Fields
from worker.layout import MLP_UNIT, Layout, Slice, Stage
from worker.model_config import ModelConfig
from worker.split import split_evenly


def model(**fields: Any) -> ModelConfig:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 331,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return ModelConfig.from_fields(Fields(values | fields, "config.json"), Fields({}, "generation_config.json"))


def random_model(draw: random.Random) -> ModelConfig:
    kv_heads = draw.choice([1, 2, 3, 4, 6, 8])
    architecture = draw.choice(["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
    biases = {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}
    return model(
        architectures=[architecture],
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * draw.choice([1, 2, 3, 4, 7]),
        head_dim=draw.choice([2, 8, 32]),
        intermediate_size=draw.randrange(17, 300),
        vocab_size=draw.choice([draw.randrange(1, 40), draw.randrange(100, 900)]),
        num_hidden_layers=draw.randrange(1, 9),
        tie_word_embeddings=draw.random() < 0.5,
        **(biases if architecture == "LlamaForCausalLM" else {}),
    )


def random_layout(draw: random.Random) -> Layout:
    page = draw.choice([1, 1, 2, 3, 4])
    return Layout(page * draw.choice([1, 2, 3, 4, 8]), draw.choice([1, 1, 2, 3, 4]), page)


def possible(seed: int, count: int) -> list[tuple[ModelConfig, Layout]]:
    """Random models with layouts that they can have; every third has several slices and several groups."""
    draw = random.Random(seed)
    found: list[tuple[ModelConfig, Layout]] = []
    while len(found) < count:
        config, layout = random_model(draw), random_layout(draw)
        if layout.is_possible(config) and (len(found) % 3 or (layout.page > 1 and layout.num_slices > 1)):
            found.append((config, layout))
    return found


def covered(cuts: list[dict[str, Slice]], config: ModelConfig, name: str, dimension: int) -> list[int]:
    """How many ranks read each row (or column) of a tensor."""
    counts = [0] * config.tensor_shapes()[name][dimension]
    for cut in (each[name] for each in cuts if name in each):
        for i in (cut.rows, cut.columns)[dimension] or range(len(counts)):
            counts[i] += 1
    return counts


def costs(config: ModelConfig) -> tuple[int, int, int]:
    """Weights of a layer without its MLP's rows, of one of those rows, and four fifths of the head's."""
    sizes = {
        name.removeprefix("model.layers.0."): math.prod(shape)
        for name, shape in config.tensor_shapes().items()
        if name.startswith("model.layers.0.")
    }
    rows = sum(
        size for name, size in sizes.items() if "gate" in name or "up_proj" in name or name == "mlp.down_proj.weight"
    )
    each = rows // config.intermediate_size
    return sum(sizes.values()) - rows, each, config.vocab_size * config.hidden_size * 4 // 5


def loads(config: ModelConfig, stages: Sequence[Stage], head_rows: int | None = None) -> list[int]:
    """What each stage counts when layers are dealt out; or where so many rows of the head are read, and each border is
    done where it makes the two stages as equal as it can."""
    rest, row, head = costs(config)
    found, even = [], 0
    for stage in stages:
        rows = (len(stage.layers) - 1) * config.intermediate_size + len(stage.last_mlp) + len(stage.carried_mlp)
        if head_rows is None:
            rows += sum(map(len, (*stage.border_out[: stage.border_even], *stage.border_in[even:])))
            even = stage.border_even
        found.append(len(stage.layers) * rest + rows * row)
    found[-1] += head if head_rows is None else head_rows * config.hidden_size
    if head_rows is not None:
        assert len(stages) == 2
        for piece in stages[0].border_out:
            found[found[0] > found[1]] += len(piece) * row
    return found


def whole_layers(config: ModelConfig, pipeline: int) -> tuple[tuple[range, ...], int]:
    """The cut between layers only, and what its largest stage counts."""
    rest, row, head = costs(config)
    layers = [rest + row * config.intermediate_size] * config.num_layers
    layers[-1] += head
    runs = split_evenly(layers, pipeline)
    return runs, max(sum(layers[at] for at in run) for run in runs)


MID = {
    "vocab_size": 32000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "head_dim": 64,
}


class TestParts:
    @pytest.mark.parametrize("seed", range(4))
    def test_every_tensor_is_dealt_out_once_or_copied_as_stated(self, seed: int) -> None:
        for config, layout in possible(seed, 30):
            cuts = [part.tensors(config) for part in layout.parts(config)]
            copies = layout.page * max(1, layout.num_slices // config.num_kv_heads)
            tied = config.tie_word_embeddings
            carried = {part.layers.start - 1 for part in layout.parts(config) if part.is_carrying}
            twice = {f"model.layers.{layer}.post_attention_layernorm.weight" for layer in carried}
            borders = {part.layers[-1]: part.border_out for part in layout.parts(config) if part.border_out}
            for name, shape in config.tensor_shapes().items():
                columns = set(covered(cuts, config, name, 1)) if len(shape) > 1 else None
                rows = covered(cuts, config, name, 0)
                border = borders.get(int(name.split(".")[2])) if "layers" in name else None
                if border and "mlp" in name and not name.endswith("down_proj.bias"):
                    units = range(border[0].start, border[-1].stop)
                    on = covered(cuts, config, name, int("down_proj" in name))
                    assert on == [1 + (unit in units) for unit in range(config.intermediate_size)]
                    continue
                linear, kind = name.split(".")[-2:]
                if linear in ("k_proj", "v_proj"):
                    assert set(rows) == {copies}
                elif linear in ("q_proj", "gate_proj", "up_proj", "lm_head"):
                    assert set(rows) == {1}
                elif linear in ("o_proj", "down_proj"):
                    assert (columns, kind) == ({1}, "weight") or (set(rows), kind) == ({1}, "bias")
                elif linear == "embed_tokens":
                    assert set(rows) == {layout.tensor + (tied and layout.pipeline > 1)}
                else:
                    assert set(rows) == {layout.tensor * (1 + (name in twice))} and "norm" in linear

    @pytest.mark.parametrize("seed", range(4))
    def test_a_slice_attends_with_the_heads_of_its_keys(self, seed: int) -> None:
        for config, layout in possible(10 + seed, 60):
            parts = layout.parts(config)
            group_size = config.num_heads // config.num_kv_heads
            for part in parts:
                peers = [parts[rank] for rank in part.slice_peers]
                assert [head for peer in peers for head in peer.heads] == list(part.attended)
                assert [peer.group for peer in peers] == list(range(layout.page))
                assert {(peer.stage, peer.slice, peer.kv_heads) for peer in peers} == {
                    (part.stage, part.slice, part.kv_heads)
                }
                # the kernels' own rule: query head i of the slice has key-value head i // (attended / kv)
                share, rest = divmod(len(part.attended), len(part.kv_heads))
                assert rest == 0
                for local, head in enumerate(part.attended):
                    assert part.kv_heads[local // share] == head // group_size

    @pytest.mark.parametrize("seed", range(2))
    def test_ranks_stages_groups_and_devices(self, seed: int) -> None:
        for config, layout in possible(20 + seed, 60):
            parts = layout.parts(config)
            assert [part.rank for part in parts] == list(range(layout.num_ranks))
            devices = {}
            for part in parts:
                t = part.slice * layout.page + part.group
                assert (part.rank, part.tensor_rank) == (part.stage * layout.tensor + t, t)
                assert part == layout.part(config, part.rank)
                assert [parts[rank].stage for rank in part.tensor_peers] == [part.stage] * layout.tensor
                assert part.is_first == (part.stage == 0) and part.is_last == (part.stage == layout.pipeline - 1)
                devices.setdefault(part.device_id(100), set()).add((part.stage, part.group))
            assert sorted(devices) == list(range(100, 100 + layout.pipeline * layout.page))
            assert all(len(places) == 1 for places in devices.values())
            firsts = parts[:: layout.tensor]
            assert [layer for part in firsts for layer in part.layers] == list(range(config.num_layers))

    def test_uneven_shares_differ_by_one_unit_and_none_is_empty(self) -> None:
        parts = Layout(4).parts(model(intermediate_size=5 * MLP_UNIT + 3, vocab_size=331))
        assert [part.mlp for part in parts] == [range(16), range(16, 48), range(48, 64), range(64, 83)]
        assert [part.vocab for part in parts] == [range(64), range(64, 160), range(160, 256), range(256, 331)]
        assert [len(part.vocab) for part in Layout(4).parts(model(vocab_size=7))] == [1, 2, 2, 2]
        for config, layout in possible(31, 60):
            for part in layout.parts(config):
                assert part.heads and part.kv_heads and part.mlp and part.vocab and part.layers

    def test_both_parts_of_a_cut_mlp_are_dealt_over_the_tensor_ranks(self) -> None:
        config = model(num_hidden_layers=3, intermediate_size=150, mlp_bias=True, vocab_size=213)
        parts = Layout(2, 2).parts(config)
        assert [part.layers for part in parts] == [range(2)] * 2 + [range(2, 3)] * 2
        assert [part.mlp for part in parts] == [range(80), range(80, 150)] * 2
        assert [part.last_mlp for part in parts] == [range(32), range(32, 64), range(80), range(80, 150)]
        assert [part.carried_mlp for part in parts] == [range(0), range(0), range(64, 112), range(112, 150)]
        assert [part.is_cut for part in parts] == [True, True, False, False]
        assert [part.is_carrying for part in parts] == [False, False, True, True]
        third = parts[2].tensors(config)
        assert {name.removeprefix("model.layers.1."): cut for name, cut in third.items() if "layers.1." in name} == {
            "post_attention_layernorm.weight": Slice(),
            **{f"mlp.{name}": Slice(range(64, 112)) for name in ("gate_proj.weight", "gate_proj.bias")},
            **{f"mlp.{name}": Slice(range(64, 112)) for name in ("up_proj.weight", "up_proj.bias")},
            "mlp.down_proj.weight": Slice(None, range(64, 112)),
        }
        assert parts[0].tensors(config)["model.layers.1.mlp.down_proj.bias"] == Slice()

    def test_the_example_of_the_design(self) -> None:
        parts = Layout(4, 1, 2).parts(model())
        assert [(part.slice, part.group) for part in parts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert [part.heads for part in parts] == [range(2), range(2, 4), range(4, 6), range(6, 8)]
        assert [part.attended for part in parts] == [range(4)] * 2 + [range(4, 8)] * 2
        assert [part.kv_heads for part in parts] == [range(1)] * 2 + [range(1, 2)] * 2

    def test_key_value_heads_replicate_where_there_are_fewer_than_slices(self) -> None:
        assert [part.kv_heads.start for part in Layout(8).parts(model())] == [0, 0, 0, 0, 1, 1, 1, 1]

    def test_what_one_rank_of_a_whole_model_reads_is_everything(self) -> None:
        config = model(attention_bias=True, mlp_bias=True)
        cuts = Layout().part(config, 0).tensors(config)
        assert list(cuts) == list(config.tensor_shapes())
        for name, cut in cuts.items():
            for size, part in zip(config.tensor_shapes()[name], (cut.rows, cut.columns), strict=False):
                assert part in (None, range(size))

    def test_a_tied_head_is_the_embedding_again_on_the_last_stage(self) -> None:
        config = model(tie_word_embeddings=True)
        first, last = Layout(1, 2).parts(config)
        assert first.tensors(config)["model.embed_tokens.weight"] == Slice()
        assert last.tensors(config)["model.embed_tokens.weight"] == Slice(range(331))

    def test_a_rank_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="rank: got 4, must be from 0 to 3"):
            Layout(2, 2).part(model(), 4)

    def test_bytes_of_a_block(self) -> None:
        part = Layout(4, 2, 2).part(model(), 5)
        assert len(part.layers) == 2
        assert part.block_bytes(16, 32) == 2 * 2 * 1 * 16 * 32
        assert part.device_block_bytes(16, 32) == 2 * part.block_bytes(16, 32)


class TestStages:
    def test_three_quarters_of_the_head_count_and_the_embedding_does_not(self) -> None:
        one_piece = {"num_hidden_layers": 13, "intermediate_size": MLP_UNIT}
        config = model(vocab_size=1, **one_piece)
        even = [len(stage.layers) for stage in Layout(1, 4).stages(config)]
        assert (sum(even), max(even)) == (13, 4)
        size = sum(
            64 if len(shape) == 1 else shape[0] * shape[1]
            for name, shape in config.tensor_shapes().items()
            if name.startswith("model.layers.0.")
        )
        heavy = model(vocab_size=4 * size // 64, **one_piece)
        assert [len(stage.layers) for stage in Layout(1, 4).stages(heavy)] == [4, 4, 4, 1]

    @pytest.mark.parametrize("seed", range(4))
    def test_they_end_between_layers_or_where_it_makes_the_largest_smaller_inside_mlps(self, seed: int) -> None:
        cut = borders = 0
        for config, layout in possible(40 + seed, 100):
            stages = layout.stages(config)
            runs, largest = whole_layers(config, layout.pipeline)
            assert [layer for stage in stages for layer in stage.layers] == list(range(config.num_layers))
            assert all(stage.layers for stage in stages)
            size = config.intermediate_size
            if all(len(stage.last_mlp) == size for stage in stages):  # whatever the tensor ranks
                assert [stage.layers for stage in stages] == list(runs)
                assert not any(stage.carried_mlp for stage in stages)
                continue
            cut += 1
            assert max(loads(config, stages)) <= 0.99 * largest
            assert stages[0].carried_mlp == range(0) and stages[-1].last_mlp == range(size)
            assert stages[0].border_in == stages[-1].border_out == ()
            for stage, after in pairwise(stages):
                assert stage.border_out == after.border_in and stage.border_even <= len(stage.border_out)
                units = [stage.last_mlp, *stage.border_out, after.carried_mlp]
                assert [at for run in units for at in run] == list(range(size))
                borders += bool(stage.border_out)
                assert not stage.border_out or layout.tensor == 1
                for run in units[:-1]:
                    assert run and (run.stop == size or run.stop % (MLP_UNIT * layout.tensor) == 0)
            for part in layout.parts(config):
                stage = stages[part.stage]
                assert bool(part.last_mlp) and bool(part.carried_mlp) == bool(stage.carried_mlp) == part.is_carrying
                assert part.is_cut == (len(stage.last_mlp) < size)
                assert max(len(part.last_mlp), len(part.carried_mlp)) <= len(part.mlp)
                assert (part.border_in, part.border_out) == (stage.border_in, stage.border_out)
        assert cut > 5 and borders > 2

    def test_two_of_shape_mid_are_even(self) -> None:
        config = model(**MID)
        first, last = stages = Layout(1, 2).stages(config)
        # 12 layers, an attention, 12 / 16 of an MLP: from 1 to 15 of those are on both stages
        border = tuple(range(304 * begin, 304 * end) for begin, end in pairwise((1, 9, 10, 11, 12, 13, 14, 15)))
        assert first == Stage(range(13), range(304), range(0), (), border, 4)
        assert last == Stage(range(13, 24), range(4864), range(15 * 304, 4864), border)
        found = loads(config, stages)
        assert max(found) < 1.003 * sum(found) / 2
        for head_rows, off in (
            (32000, 1.003),
            (24000, 1.003),
            (1, 1.015),
        ):  # two of one rank are about even with any head
            each = loads(config, stages, head_rows)
            assert max(each) < off * sum(each) / 2
        plain = Layout(2, 2).stages(config)
        assert [len(stage.last_mlp) for stage in plain] == [12 * 304 - 128, 4864] and not plain[0].border_out
        runs, largest = whole_layers(config, 2)
        assert runs == (range(13), range(13, 24)) and round(largest / (sum(found) / 2), 3) == 1.018

    def test_a_layer_has_at_most_sixteen_pieces(self) -> None:
        """All shares of the middle one of three, as the head grows: the ends of its pieces."""
        for layout, unit in ((Layout(1, 2), 16), (Layout(2, 2), 32)):
            ends = set()
            for vocab in range(2, 12000, 150):
                config = model(num_hidden_layers=3, intermediate_size=1600, vocab_size=vocab)
                stage = layout.stages(config)[0]
                ends.add((stage.last_mlp, *stage.border_out)[stage.border_even].stop)
            assert 5 < len(ends) <= 16 and all(end == 1600 or end % unit == 0 for end in ends)

    def test_a_cut_that_wins_little_is_between_layers(self) -> None:
        config = model(num_hidden_layers=126, vocab_size=1066)
        stages = Layout(1, 2).stages(config)
        assert [len(stage.layers) for stage in stages] == [63, 63] and stages[1].carried_mlp == range(0)
        assert max(loads(config, stages)) > 1.004 * sum(loads(config, stages)) / 2

    def test_the_largest_run_is_the_least_possible(self) -> None:
        draw = random.Random(5)
        for _ in range(2000):
            costs = [draw.choice([1, 1, 5, draw.randrange(1, 40)]) for _ in range(draw.randrange(1, 10))]
            parts = draw.randrange(1, len(costs) + 1)
            runs = split_evenly(costs, parts)
            assert [i for run in runs for i in run] == list(range(len(costs)))
            assert len(runs) == parts and all(runs)
            best = min(
                max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
                for cuts in combinations(range(1, len(costs)), parts - 1)
            )
            assert max(sum(costs[i] for i in run) for run in runs) == best

    def test_what_is_left_over_is_spread(self) -> None:
        assert [len(run) for run in split_evenly([1] * 7, 3)] == [2, 3, 2]
        with pytest.raises(ValueError, match="parts: got 3, must be from 1 to 2"):
            split_evenly([1, 1], 3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("sizes", "text"),
        [
            ((0, 1, 1), "tensor_parallel_size: got 0, must be from 1 to 4096"),
            ((1, 5000, 1), "pipeline_parallel_size: got 5000, must be from 1 to 4096"),
            ((6, 1, 4), "page_parallel_size: got 4, must divide tensor_parallel_size (6); possible: 1, 2, 3, 6"),
        ],
    )
    def test_of_any_model(self, sizes: tuple[int, int, int], text: str) -> None:
        with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
            Layout(*sizes)

    @pytest.mark.parametrize(
        ("fields", "sizes", "text"),
        [
            (
                {},
                (3, 1, 1),
                "tensor_parallel_size: got 3, must divide the model's 8 query heads; "
                "possible: 1, 2, 4, 8 with page_parallel_size 1",
            ),
            (
                {"num_attention_heads": 12, "num_key_value_heads": 6},
                (4, 1, 1),
                "tensor_parallel_size: got 4, must make slices (tensor_parallel_size / page_parallel_size = 4) that "
                "divide the model's 6 key-value heads or are a multiple of them; "
                "possible: 1, 2, 3, 6, 12 with page_parallel_size 1; or page_parallel_size 2, 4 with "
                "tensor_parallel_size 4",
            ),
            (
                {"intermediate_size": 40},
                (8, 1, 1),
                "tensor_parallel_size: got 8, must be at most 3: the 40 rows of the MLP are dealt in units of 16; "
                "possible: 1, 2 with page_parallel_size 1",
            ),
            (
                {"vocab_size": 3},
                (4, 1, 1),
                "tensor_parallel_size: got 4, must be at most the vocabulary's 3 rows; "
                "possible: 1, 2 with page_parallel_size 1",
            ),
            (
                {},
                (3, 1, 3),
                "tensor_parallel_size: got 3, must divide the model's 8 query heads; "
                "possible: 1, 2, 4, 8 with page_parallel_size 1",
            ),
            (
                {},
                (2, 5, 1),
                "pipeline_parallel_size: got 5, must be at most the model's 4 layers; possible: 1 to 4",
            ),
        ],
    )
    def test_name_the_flag_the_reason_and_the_possible_values(
        self, fields: dict[str, Any], sizes: tuple[int, int, int], text: str
    ) -> None:
        config = model(**fields)
        with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
            Layout(*sizes).check(config)
        with pytest.raises(ConfigError):
            Layout(*sizes).parts(config)

    def test_what_is_called_possible_is(self) -> None:
        draw = random.Random(9)
        refused = 0
        while refused < 200:
            config, layout = random_model(draw), random_layout(draw)
            if layout.is_possible(config):
                layout.check(config)
                continue
            refused += 1
            with pytest.raises(ConfigError) as caught:
                layout.check(config)
            error = caught.value
            if error.field == "pipeline_parallel_size":
                assert error.cure == f"possible: 1 to {config.num_layers}"
                continue
            named = [
                Layout(int(size), 1, int(page))
                for sizes, page in re.findall(r"([\d, ]+) with page_parallel_size (\d+)", error.cure)
                for size in sizes.split(",")
            ] + [
                Layout(int(size), 1, int(page))
                for pages, size in re.findall(r"size ([\d, ]+) with tensor_parallel_size (\d+)", error.cure)
                for page in pages.split(",")
            ]
            assert named and all(each.is_possible(config) for each in named)
            # and nothing that is possible with this page size was left out
            same_page = {each.tensor for each in named if each.page == layout.page}
            sizes = range(layout.page, config.num_heads + 1, layout.page)
            assert same_page >= {size for size in sizes if Layout(size, 1, layout.page).is_possible(config)}


def test_the_arithmetic_needs_no_torch() -> None:
    code = "import worker.layout, sys; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
