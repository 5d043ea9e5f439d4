"""One sequence over eight devices: exact rows, right answers, even pages, few bytes of metadata; pages read back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.long_context import OUTPUTS, TOLERANCE, by_context, main, measure
from benchmarks.long_model import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, write_long_model
from benchmarks.long_rows import Errors, Exact, Held, check_rows, read_back
from benchmarks.long_shard import Settings, Shard, Step, shard
from launch.models.recall import make_recall
from worker import page_reads
from worker.loop import EpochOver

CI_LENGTH = 32_768
SMALL = Settings(2048, devices=2, share=0.56)


def test_rows_of_a_sequence_over_eight_devices_are_exact(tmp_path: Path) -> None:
    settings = Settings(CI_LENGTH)
    found = measure("rows", settings)
    pages = (CI_LENGTH + OUTPUTS - 1) // settings.block_size + 1
    held = found["pages_per_device"]
    assert sum(held) == pages and max(held) - min(held) <= 1
    assert max(held) <= settings.device_blocks == int(0.14 * CI_LENGTH / settings.block_size) + 1 < pages // 7
    errors = Errors(**found["errors"])
    assert found["right"] and errors.are_within(TOLERANCE)
    assert errors.change > 5 * TOLERANCE, "a device that was left out would be seen"
    for step, tokens, sampled in (  # a sampled row: token, logit and sum of the own part of the vocabulary
        (found["prefill_bytes"], settings.step_tokens, 0),
        (found["decode_bytes"], 1, 3 * 4),
    ):
        assert step["tokens"] == tokens
        assert step["sums"] == 2 * LAYERS * tokens * HIDDEN * 4 + sampled
        assert step["attention"] == LAYERS * tokens * (HEADS // 8 * HEAD_DIM * 2 + HEADS * (HEAD_DIM + 1) * 4)
    assert found["prefill_bytes"]["metadata"] < 6 * settings.step_tokens
    assert found["decode_bytes"]["metadata"] < 200
    assert [each["context"] for each in found["decode"]] == [1 << power for power in range(10, 16)]
    assert found["prefill"][-1]["context"] == CI_LENGTH and len(found["peak_bytes"]) == 8


def test_64_random_keys_are_right_over_eight_devices() -> None:
    found = measure("recall", Settings(CI_LENGTH))
    assert (found["answered_right"], found["questions"], found["devices_read"]) == (64, 64, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_model(tmp_path_factory.mktemp("long"))


@pytest.fixture
def pair(folder: Path) -> Iterator[Shard]:
    """Two devices."""
    with shard(folder, SMALL) as found:
        yield found


def run(pair: Shard) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens whose K and V lie on the devices, and their pages; some rows are kept."""
    prompt = [2 + 7 * at % (VOCAB - 2) for at in range(SMALL.length)]
    pair.wanted = {100, 1000, 1500, SMALL.length + 1}
    outputs, pages, _ = pair.run(prompt, 3)
    assert set(pair.rows) == pair.wanted
    return [*prompt, *outputs[:-1]], pages


def test_the_check_sees_a_wrong_page_a_wrong_row_and_a_missing_device(pair: Shard, folder: Path) -> None:
    tokens, pages = run(pair)
    exact = Exact(folder)

    def check(held: list[Held], rows: dict[int, torch.Tensor]) -> Errors:
        return check_rows(exact, held, torch.tensor(tokens), rows)

    held = read_back(pair.ranks, pages, SMALL.block_size, len(tokens), LAYERS)
    assert torch.equal(torch.cat([each.at for each in held]).sort().values, torch.arange(len(tokens)))
    assert check(held, pair.rows).are_within(TOLERANCE)
    swapped = {**pair.rows, 100: pair.rows[1000], 1000: pair.rows[100]}
    assert not check(held, swapped).are_within(TOLERANCE)
    missing = Held(1, held[1].at[:0], [(k[:0], v[:0]) for k, v in held[1].kv])
    assert not check([held[0], missing], pair.rows).are_within(TOLERANCE)
    runner = pair.ranks.runner
    assert runner is not None
    here, there = (block for device, block in pages if device == 0 and 0 <= block < 2)
    runner.cache.pool[0, [here, there], 1] = runner.cache.pool[0, [there, here], 1]
    errors = check(read_back(pair.ranks, pages, SMALL.block_size, len(tokens), LAYERS), pair.rows)
    assert errors.first_v > 0.1 and errors.first_k <= TOLERANCE


def test_pages_of_a_rank_are_read_in_frames_of_any_size(pair: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pages = run(pair)
    blocks = [block for device, block in pages if device == 1]
    whole = pair.ranks.gather_kv(1, 1, blocks)
    monkeypatch.setattr(page_reads, "ANSWER_BYTES", 5000)
    parts = pair.ranks.gather_kv(1, 1, blocks)
    assert whole[0].shape == whole[1].shape == (len(blocks) * SMALL.block_size, KV_HEADS, HEAD_DIM)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert [len(each) for each in pair.ranks.gather_kv(1, 0, [])] == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_pages_that_are_not_there_are_refused_and_the_epoch_goes_on(pair: Shard, rank: int) -> None:
    last = SMALL.device_blocks - 1
    for layer, blocks in ((LAYERS, [0]), (-1, [0]), (0, [0, last + 1]), (0, [-1])):
        with pytest.raises(ValueError, match="pages: got layer"):
            pair.ranks.gather_kv(rank, layer, blocks)
    with pytest.raises(ValueError, match="rank: got 2, must be from 0 to 1"):
        pair.ranks.gather_kv(2, 0, [0])
    assert len(pair.ranks.gather_kv(rank, 0, [last])[0]) == SMALL.block_size
    assert len(pair.run(list(range(2, 50)), 3)[0]) == 3


def test_a_rank_that_died_gives_no_pages(pair: Shard) -> None:
    os.kill(pair.llm.pids[1], signal.SIGKILL)
    with pytest.raises(EpochOver):
        while True:  # until its end is noticed
            pair.ranks.gather_kv(1, 0, [0])


def test_times_per_token_are_of_stretches_that_end_at_powers_of_two_and_half_way() -> None:
    ends = [512 * index for index in range(1, 10)]
    steps = [Step(end, 512, end / 1e3, 2 * end / 1e3, 0, 0, 0) for end in ends]
    found = by_context(steps)
    assert [each["context"] for each in found] == [1024, 1536, 2048, 3072, 4096, 4608]
    assert found[0] == pytest.approx({"context": 1024, "ms_per_token": 1.5, "cpu_ms_per_token": 3.0})
    assert found[3] == pytest.approx({"context": 3072, "ms_per_token": 5.5, "cpu_ms_per_token": 11.0})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--length", "1000"], "--length: got 1000, must be from 1024 to 1048576"),
        (["--share", "0.13"], "--share: got 0.13, all devices together must have blocks for 1.05 of the pages"),
        (["--devices", "3"], "invalid choice: 3"),
    ],
)
def test_the_benchmark_refuses_what_cannot_be(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_a_recall_model_without_rows_in_its_mlps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="intermediate: got 0, must be at least 1"):
        make_recall(tmp_path, 8, 1, 0)
