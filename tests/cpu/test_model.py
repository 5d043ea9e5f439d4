"""The decoder over the paged cache against transformers: float32 logits, bfloat16 error, tables, the runner."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import cpu
from pagetable.errors import ConfigError, InvariantBroken, ModelError
from pagetable.ids import PlanNumber, SequenceId
from pagetable.sampling import SamplingParams
from tests.model_rig import CHUNKS, LENGTHS, WHOLE, Rig, greedy, prompts, run_all, run_reference
from tests.models import TWELVE, make_model, reference
from worker.kv_cache import PagedKVCache
from worker.model import Decoder
from worker.model_config import ModelConfig
from worker.plan import Admit, Plan
from worker.runner import NOT_FINITE, Runner
from worker.sampler import Sampler
from worker.tables import TableMirror
from worker.weights import open_weights

KINDS = ("torch", *cpu.levels())


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    return case[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TWELVE, ids=name_of)
def test_float32_logits_equal_those_of_transformers(
    case: tuple[str, str, dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    _, arch, overrides = case
    folder = make_model(tmp_path, arch, seed=3, **overrides)
    sequences = prompts()
    expected = run_reference(folder, sequences)
    for chunks, block_size, num_blocks in ((WHOLE, 16, 64), (CHUNKS, 4, 192)):
        found = run_all(Rig.make(folder, block_size=block_size, num_blocks=num_blocks, kind=kind), sequences, chunks)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-4
    # logits that are all alike, or a decode that repeats one token, would make equality cheap
    assert 1.5 < expected[-1].std() < 4.0
    assert len(set(expected[-1].argmax(-1).tolist())) > 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TWELVE, ids=name_of)
def test_bfloat16_is_as_near_to_float32_as_transformers(
    case: tuple[str, str, dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    _, arch, overrides = case
    folder = make_model(tmp_path, arch, seed=4, dtype="bfloat16", **overrides)
    sequences = prompts()
    exact = torch.cat(run_reference(folder, sequences, torch.float32))
    theirs = torch.cat(run_reference(folder, sequences, torch.bfloat16))
    ours = torch.cat(run_all(Rig.make(folder, torch.bfloat16, kind=kind), sequences, CHUNKS))
    assert 0 < (ours - exact).norm() <= (theirs - exact).norm()


def test_float16_weights_run_in_float32_and_sharded_folders_read_the_same(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "one", seed=5, dtype="float16")
    shards = make_model(tmp_path / "many", seed=5, dtype="float16", max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    tokens = prompts()[4]
    expected = run_reference(folder, [tokens])[0]
    for path in (folder, shards):
        assert (Rig.make(path).logits([(0, 0, tokens)]) - expected).abs().max() < 1e-4


def test_positions_near_a_million_are_rotated_in_float64(tmp_path: Path) -> None:
    """Rotation by equal distance is the same anywhere; with float32 angles it is off by 0.05 rad up there."""
    model = Rig.make(make_model(tmp_path, max_position_embeddings=1 << 21)).model
    assert isinstance(model, Decoder)
    near, far = model._angles(torch.tensor([0, 3])), model._angles(torch.tensor([1_000_000, 1_000_003]))
    cosines = [cos[0] * cos[1] + sin[0] * sin[1] for cos, sin in (near, far)]
    assert (cosines[0] - cosines[1]).abs().max() < 1e-6


def test_progress_counts_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    calls: list[tuple[int, int]] = []
    Decoder(ModelConfig.from_folder(folder), open_weights(folder), torch.float32, lambda *now: calls.append(now))
    total = 4 * sum(p.numel() for p in reference(folder).parameters())
    assert calls[-1] == (total, total)
    assert len(calls) == 21
    assert calls == sorted(calls)


def test_a_model_whose_weights_do_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, tie_word_embeddings=True)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing, must be there with shape \[331, 64\]"):
        Decoder(ModelConfig.from_folder(folder), open_weights(folder), torch.float32)


class TestPagedKVCache:
    def test_what_is_written_is_gathered(self, tmp_path: Path) -> None:
        config = ModelConfig.from_folder(make_model(tmp_path, num_key_value_heads=2))
        cache = PagedKVCache(config, num_blocks=6, block_size=4, dtype=torch.float32)
        assert cache.pool.shape == (2, 6, 2, 2, 4, 32)
        assert cache.bytes_per_block(config, 4, torch.float32) == 2 * 2 * 2 * 4 * 32 * 4 == cache.pool.nbytes // 6
        k, v = torch.randn(7, 2, 32), torch.randn(7, 2, 32)
        slots = torch.tensor([5 * 4 + i for i in range(4)] + [1 * 4 + i for i in range(3)])
        cache.write_kv(1, k, v, slots)
        found = cache.gather_kv(1, [5, 1], 7)
        assert torch.equal(found[0], k)
        assert torch.equal(found[1], v)
        assert not cache.pool[0].any()

    def test_a_copied_page_holds_all_layers_and_the_source_stays(self, tmp_path: Path) -> None:
        config = ModelConfig.from_folder(make_model(tmp_path))
        cache = PagedKVCache(config, num_blocks=3, block_size=4, dtype=torch.bfloat16)
        cache.pool.normal_(generator=torch.Generator().manual_seed(1))
        before = cache.pool.clone()
        cache.copy_page(2, 0)
        assert torch.equal(cache.pool[:, 0], before[:, 2])
        assert torch.equal(cache.pool[:, 1:], before[:, 1:])

    def test_a_pool_beyond_the_address_space_is_refused(self, tmp_path: Path) -> None:
        config = ModelConfig.from_folder(make_model(tmp_path))
        with pytest.raises(ConfigError, match="num_gpu_blocks_override: got 1152921504606846976, must fit in memory"):
            PagedKVCache(config, 1 << 60, 16, torch.float32)


class TestTableMirror:
    def make(self) -> tuple[TableMirror, Plan]:
        """Rows: slot 2 decodes at position 9, slot 0 prefills 3..7, block size 4."""
        mirror = TableMirror(max_num_seqs=3, max_blocks_per_seq=3, block_size=4)
        plan = Plan(PlanNumber(1))
        plan.slots, plan.first_position = array("i", (2, 0)), array("i", (9, 3))
        plan.query_start, plan.tokens = array("i", (0, 1, 6)), array("i", (50, 60, 61, 62, 63, 64))
        plan.table_slot, plan.table_index = array("i", (2, 2, 2, 0, 0)), array("i", (0, 1, 2, 0, 1))
        plan.table_group, plan.table_blocks = array("i", [0] * 5), [array("i", (7, 3, 8, 1, 4))]
        mirror.apply(plan)
        return mirror, plan

    def test_arrays_of_a_batch(self) -> None:
        mirror, plan = self.make()
        assert mirror.tables.tolist() == [[1, 4, -1], [-1, -1, -1], [7, 3, 8]]
        batch = mirror.batch(plan, (0, 5, 2))
        assert batch.tokens.tolist() == [50, 60, 61, 62, 63, 64]
        assert batch.positions.tolist() == [9, 3, 4, 5, 6, 7]
        assert batch.slots.tolist() == [8 * 4 + 1, 1 * 4 + 3, 4 * 4, 4 * 4 + 1, 4 * 4 + 2, 4 * 4 + 3]
        assert batch.query_start.tolist() == [0, 1, 6]
        listed = {w: (p.start.tolist(), p.block.tolist(), p.position.tolist()) for w, p in batch.pages.items()}
        assert listed == {
            0: ([0, 3, 5], [7, 3, 8, 1, 4], [0, 4, 8, 0, 4]),
            5: ([0, 2, 4], [3, 8, 1, 4], [4, 8, 0, 4]),  # position 9 sees 5..9; position 3 sees 0..3
            2: ([0, 1, 3], [8, 1, 4], [8, 0, 4]),
        }
        assert {w: (m.window, m.sinks, m.first_position.tolist()) for w, m in batch.masks.items()} == {
            w: (w, 0, [9, 3]) for w in (0, 5, 2)
        }

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (
                {"table_slot": (3,), "table_index": (0,), "table_blocks": (1,)},
                "table_slot: got 3 to 3, must be .* 0 to 2",
            ),
            ({"table_slot": (-1,), "table_index": (0,), "table_blocks": (1,)}, "table_slot: got -1"),
            ({"table_slot": (0,), "table_index": (3,), "table_blocks": (1,)}, "table_index: got 3"),
        ],
    )
    def test_a_change_out_of_range_changes_nothing(self, change: dict[str, tuple[int, ...]], named: str) -> None:
        mirror, _ = self.make()
        before = mirror.tables.copy()
        plan = Plan(PlanNumber(2))
        for name, values in change.items():
            setattr(plan, name, [array("i", values)] if name == "table_blocks" else array("i", values))
        with pytest.raises(InvariantBroken, match=named):
            mirror.apply(plan)
        assert (mirror.tables == before).all()

    def test_a_row_beyond_its_table_is_refused(self) -> None:
        mirror, plan = self.make()
        plan.first_position[0] = 12
        with pytest.raises(InvariantBroken, match="first_position: got 2 to 4, must be from 0 to 3"):
            mirror.batch(plan, (0,))


def admit(slot: int, tokens: list[int], **params: Any) -> Admit:
    sampling = SamplingParams(temperature=0.0, seed=0, **params)
    return Admit(slot, SequenceId(slot), 0, sampling, len(tokens), array("i", tokens))


class TestRunner:
    def make(self, folder: Path) -> tuple[Rig, Runner]:
        rig = Rig.make(folder)
        return rig, Runner(rig.model, rig.cache, rig.tables, Sampler(rig.model.config.vocab_size, 16))

    @torch.inference_mode()
    def test_greedy_tokens_equal_those_of_transformers(self, tmp_path: Path) -> None:
        overrides = next(overrides for name, _, overrides in TWELVE if name == "qwen2-mixed-window")
        folder = make_model(tmp_path, "qwen2", seed=6, **overrides)
        rig, runner = self.make(folder)
        model = reference(folder)
        sequences = [tokens[:length] for tokens, length in zip(prompts(), LENGTHS, strict=True)]
        expected = [greedy(model, tokens, 24) for tokens in sequences]
        plan = rig.plan([(slot, 0, tokens) for slot, tokens in enumerate(sequences)])
        plan.admits = [admit(slot, tokens) for slot, tokens in enumerate(sequences)]
        found: list[list[int]] = [[] for _ in sequences]
        for step in range(24):
            plan.sample_row = array("i", (end - 1 for end in plan.query_start[1:]))
            plan.sample_slot = array("i", range(len(sequences)))
            plan.sample_position = array("i", (len(tokens) + step for tokens in sequences))
            for tokens, token in zip(found, runner.run(plan).tokens, strict=True):
                tokens.append(token)
            plan = rig.plan([(slot, length + step, [found[slot][-1]]) for slot, length in enumerate(LENGTHS)])
        assert found == expected

    def test_copies_come_before_the_pass_and_scores_are_sliced(self, tmp_path: Path) -> None:
        """A fork: slot 1 takes slot 0's full page and a copy of its partial one, then both go their own ways."""
        folder = make_model(tmp_path, seed=8)
        rig, runner = self.make(folder)
        prompt = prompts()[7][:101]
        plan = rig.plan([(0, 0, prompt)])
        plan.admits = [admit(0, prompt, prompt_logprobs=2)]
        plan.score_row = array("i", range(100))
        plan.score_slot, plan.score_token = array("i", [0] * 100), array("i", prompt[1:])
        result = runner.run(plan)
        expected = run_reference(folder, [prompt])[0].log_softmax(-1)
        assert [score.logprob for score in result.scores] == pytest.approx(
            [float(expected[i, token]) for i, token in enumerate(prompt[1:])], abs=1e-4
        )
        assert [[token for token, _ in score.top] for score in result.scores] == expected[:100].topk(2).indices.tolist()
        table = rig.tables.tables[0]
        plan = rig.plan([(0, 101, [5])])
        plan.slots, plan.first_position = array("i", (0, 1)), array("i", (101, 101))
        plan.query_start, plan.tokens = array("i", (0, 1, 2)), array("i", (5, 9))
        plan.table_slot, plan.table_index = array("i", [1] * 7), array("i", range(7))
        plan.table_group = array("i", [0] * 7)
        plan.table_blocks = [array("i", [*table[:6].tolist(), rig.free.pop()])]
        plan.copy_from = plan.copy_to = array("i", (0,))
        plan.copy_sources = [array("i", (int(table[6]),))]
        plan.copy_targets = [plan.table_blocks[0][6:]]
        plan.admits = [admit(1, [*prompt, 9], logprobs=1)]
        plan.sample_row, plan.sample_slot = array("i", (0, 1)), array("i", (0, 1))
        plan.sample_position = array("i", (102, 102))
        result = runner.run(plan)
        after = run_reference(folder, [[*prompt, 5], [*prompt, 9]])
        assert list(result.tokens) == [int(logits[-1].argmax()) for logits in after]
        assert list(result.logprobs) == [1]
        assert result.logprobs[1].logprob == pytest.approx(float(after[1][-1].log_softmax(-1).max()), abs=1e-4)

    def test_a_row_that_is_not_finite_fails_alone(self, tmp_path: Path) -> None:
        rig, runner = self.make(make_model(tmp_path, seed=9))
        rows = [(slot, 0, tokens[:20]) for slot, tokens in enumerate(prompts()[5:8])]
        healthy = [int(rig.logits([row])[-1].argmax()) for row in rows]
        # poison the stored keys of the sequence in slot 1 only
        rig.cache.pool[:, int(rig.tables.tables[1, 0]), 0] = float("nan")
        plan = rig.plan([(slot, 19, tokens[19:]) for slot, _, tokens in rows])
        plan.admits = [admit(slot, tokens, logprobs=0) for slot, _, tokens in rows]
        plan.sample_row, plan.sample_slot = array("i", range(3)), array("i", range(3))
        plan.sample_position = array("i", [20] * 3)
        result = runner.run(plan)
        assert list(result.tokens) == [healthy[0], -1, healthy[2]]
        assert result.failed == {1: NOT_FINITE}
        assert sorted(result.logprobs) == [0, 2]

    def test_an_empty_plan_is_carried_out(self, tmp_path: Path) -> None:
        rig, runner = self.make(make_model(tmp_path))
        plan = rig.plan([])
        plan.table_slot, plan.table_index, plan.table_blocks = array("i", (3,)), array("i", (1,)), [array("i", (2,))]
        result = runner.run(plan)
        assert (list(result.tokens), result.scores, result.failed) == ([], [], {})
        assert rig.tables.tables[3, 1] == 2


@pytest.mark.parametrize("name", ["llama-9-3-legacy", "mistral-window", "qwen3-128-tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_pages_cost_little_and_the_same_in_both_decoders(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, arch, overrides = next(case for case in TWELVE if case[0] == name)
    folder = make_model(tmp_path, arch, seed=9, dtype=str(dtype).removeprefix("torch."), **overrides)
    sequences = prompts()
    truth = torch.cat(run_reference(folder, sequences))
    oracle = torch.cat(run_all(Rig.make(folder, torch.float32, pages=torch.int8), sequences, CHUNKS))
    limit = 8e-3 if dtype == torch.float32 else 1.5e-2  # measured: 3.6e-3 to 4.7e-3, 5.3e-3 to 1.1e-2
    for kind in KINDS:
        found = torch.cat(run_all(Rig.make(folder, dtype, kind=kind, pages=torch.int8), sequences, CHUNKS))
        assert (found - truth).norm() < limit * truth.norm()
        if dtype == torch.float32:  # the same bytes but for ties
            assert (found - oracle).norm() < 1e-3 * truth.norm()


@torch.inference_mode()
def hidden_rows(rig: Rig, sequences: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """The residual stream at every position, all sequences in one batch, prompts in chunks of `chunk`."""
    done = [0] * len(sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    while running := [i for i, tokens in enumerate(sequences) if done[i] < len(tokens)]:
        rows = [(i, done[i], sequences[i][done[i] : done[i] + chunk]) for i in running]
        plan = rig.plan(rows)
        rig.tables.apply(plan)
        hidden = rig.model.forward(rig.tables.batch(plan, rig.model.windows), rig.cache)
        for i, part in zip(running, hidden.split([len(tokens) for _, _, tokens in rows]), strict=True):
            parts[i].append(part)
            done[i] += len(part)
    return [torch.cat(part) for part in parts]


@pytest.mark.skipif(not cpu.levels(), reason="the native kernels are not built")
@pytest.mark.parametrize("pages", [None, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-plain", "qwen2-mixed-window"])
def test_deterministic_rows_have_equal_bits_in_any_batch_chunk_and_team(
    name: str, dtype: torch.dtype, pages: torch.dtype | None, tmp_path: Path
) -> None:
    _, arch, overrides = next(case for case in TWELVE if case[0] == name)
    folder = make_model(tmp_path, arch, seed=9, dtype=str(dtype).removeprefix("torch."), **overrides)
    sequences = [tokens for tokens in prompts() if len(tokens) > 20]

    def rig(threads: int, block_size: int = 16) -> Rig:
        kind = cpu.levels()[-1]
        return Rig.make(folder, dtype, block_size, 1536 // block_size, kind, threads, deterministic=True, pages=pages)

    whole = hidden_rows(rig(2), sequences, 1000)
    for threads, chunk, block_size in ((1, 1000, 16), (2, 1, 16), (2, 7, 16), (3, 64, 16), (2, 33, 32)):
        for ours, theirs in zip(hidden_rows(rig(threads, block_size), sequences, chunk), whole, strict=True):
            assert torch.equal(ours, theirs)
    for tokens, theirs in zip(sequences, whole, strict=True):
        assert torch.equal(hidden_rows(rig(2), [tokens], 100)[0], theirs)


@pytest.mark.skipif(not cpu.levels(), reason="the native kernels are not built")
def test_deterministic_rows_are_cut_at_fixed_positions(tmp_path: Path) -> None:
    """Beyond 4,096 keys a row has several parts; a chunk that crosses the cut has rows with and without the second."""
    folder = make_model(tmp_path, seed=9, num_hidden_layers=1, max_position_embeddings=8192)
    tokens = [int(each) for each in torch.randint(331, (4300,), generator=torch.Generator().manual_seed(3))]

    def run(chunk: int, threads: int) -> torch.Tensor:
        made = Rig.make(folder, torch.float32, 16, 300, cpu.levels()[-1], threads, deterministic=True)
        return hidden_rows(made, [tokens], chunk)[0]

    whole = run(2000, 2)
    assert torch.equal(run(700, 1), whole)
