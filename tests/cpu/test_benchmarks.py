"""The benchmarks run at tiny size, print what they promise, and count a case's least work by hand's arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, predictions, scheduler, service
from benchmarks.models import SHAPES, model_folder
from benchmarks.roofline import Cost, Work, work
from launch.bench import Case
from launch.config import EngineConfig
from tests.models import make_model
from worker.model_config import ModelConfig
from worker.scheduler import ShardScheduler

CASES = "prefill:40,decode:2,prefix:2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "wide", vocab_size=4096)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_compare_prints_a_line_for_each_case(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        str(folder),
        "--cases",
        CASES,
        "--pairs",
        "1",
        "--seconds",
        "200",
        "--threads",
        "2",
        "--json",
    ]
    assert compare.main(arguments) == 0
    found = lines(capsys.readouterr().out)
    assert [line["case"] for line in found] == CASES.split(",")
    for line in found:
        assert (line["model"], line["dtype"], line["threads"], line["pairs"]) == ("wide", "float32", 2, 1)
        assert line["ratio_low"] <= line["ratio"] <= line["ratio_high"]
        for side in compare.SIDES:
            assert line[side] == line[f"{side}_runs"][0] > 0
            assert line[f"{side}_of_roofline"] == pytest.approx(line[side] / line["roofline"], rel=0.01)
            assert line[f"{side}_of_cpu_roofline"] > 0


def test_compare_says_what_it_had_no_time_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(folder), "--cases", "prefill:20,decode,long:9", "--pairs", "2", "--seconds", "0"]
    assert compare.main([*arguments, "--threads", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [(line["case"], line["pairs"]) for line in lines(out)] == [("prefill:20", 1)]
    assert err == (
        "compare: --seconds 0 are over: decode:1 beside transformers, long:9 beside transformers did not run\n"
    )


def test_compare_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(folder), "--cases", "decode:2", "--pairs", "2", "--threads", "1", "--dtype", "bfloat16"]
    assert compare.main(arguments) == 0
    first, _, head, line, last = capsys.readouterr().out.splitlines()
    assert first.startswith("model wide, dtype bfloat16, threads 1, beside 0, torch ")
    assert head.split()[:2] == ["case", "peer"] and head.split()[-2:] == ["pairs", "others"]
    assert line.split()[:2] == ["decode:2", "transformers"] and line.split()[-2] == "2" and len(line) == len(head)
    assert last.startswith("ceilings: read ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--cases", "fast"], "compare: --case: got 'fast', must "),
        (["--peers", "fast"], "compare: --peers: got 'fast', must name some of transformers, openvino, vllm, llamacpp"),
        (["--cases", "decode", "--dtype", "auto"], "compare: --model: got 331, must have a vocabulary of 4096 or more"),
    ],
)
def test_compare_refuses_what_it_cannot_run(
    arguments: list[str], text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder if "fast" in arguments else make_model(tmp_path / "narrow")
    assert compare.main(["--model", str(model), *arguments]) == 2
    assert capsys.readouterr().err.startswith(text)


def test_an_engine_of_a_case_holds_all_of_its_requests() -> None:
    case = Case("mixed", 5)
    config = compare.engine_config(case, EngineConfig("m"))
    sizes = [len(prompt) + count for prompt, count in case.jobs("any repeat")]
    assert config.max_model_len == max(sizes)
    assert config.num_gpu_blocks_override == sum(math.ceil(n / 16) for n in sizes) + 1 + math.ceil(max(sizes) / 16)


def test_a_shape_is_written_once_and_is_what_it_says(tmp_path: Path) -> None:
    for _ in range(2):
        with model_folder("tiny", str(tmp_path / "cache")) as kept:
            config = ModelConfig.from_folder(kept)
            written = (kept / "model.safetensors").stat().st_mtime_ns, (kept / "model.safetensors").stat().st_ino
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (4, 256, SHAPES["tiny"]["vocab_size"])
    assert config.dtype == "bfloat16"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["llama-tiny-bfloat16"]
    assert ((kept / "model.safetensors").stat().st_mtime_ns, (kept / "model.safetensors").stat().st_ino) == written
    with model_folder("tiny") as temporary:
        assert ModelConfig.from_folder(temporary) == config
    assert not temporary.exists()


# make_model's shape: 2 layers, hidden 64, 4 query and 4 kv heads of 32, MLP 96, vocabulary 4096
LINEARS = 2 * (4 * 64 * 128 + 3 * 64 * 96)
HEAD = 4096 * 64
KV = 2 * 2 * 4 * 32


def attention(keys: int) -> int:
    return 2 * 4 * 4 * 32 * keys


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "prefill:3",
            Work(3, 4 * (LINEARS + HEAD + 3 * KV), 2 * 3 * LINEARS + 2 * HEAD + attention(1 + 2 + 3)),
        ),
        (
            "decode:2",
            Work(
                2 * 127,
                4 * (127 * (LINEARS + HEAD) + 2 * KV * sum(range(129, 256))),
                2 * (127 * 2 * (LINEARS + HEAD) + attention(sum(range(129, 256)))),
            ),
        ),
        (
            "prefix:2",
            Work(
                128,
                4 * (64 * (LINEARS + HEAD) + KV * (2 * sum(range(1057, 1120)) - 63 * 1024)),
                2 * LINEARS * (1024 + 2 * 32 + 2 * 63)
                + 2 * HEAD * 128
                + attention(sum(range(1, 1025)) + 2 * sum(range(1025, 1120))),
            ),
        ),
    ],
)
def test_the_least_work_of_a_case(case: str, expected: Work, folder: Path) -> None:
    assert work(Case.parse(case), ModelConfig.from_folder(folder), 4) == expected


def test_a_warm_prefix_costs_nothing_and_a_missing_one_all(folder: Path) -> None:
    model = ModelConfig.from_folder(folder)
    warm, cold, missing = (work(Case.parse(f"{kind}:3"), model, 4) for kind in ("prefixwarm", "prefix", "noprefix"))
    prefix = Cost(model, 4).flops(0, 1024, 0)
    assert (cold.flops - warm.flops, missing.flops - warm.flops) == (prefix, 3 * prefix)
    assert warm.num_bytes == cold.num_bytes == missing.num_bytes - 63 * 2 * 1024 * KV * 4


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 40), (20, 60), (50, 51)])
def test_a_window_cuts_what_is_seen(start: int, stop: int, tmp_path: Path) -> None:
    model = ModelConfig.from_folder(make_model(tmp_path, "mistral", sliding_window=24))
    assert Cost(model, 2).seen(start, stop) == 2 * sum(min(24, at + 1) for at in range(start, stop))


def test_a_roofline_is_the_slower_of_reading_and_computing() -> None:
    assert Work(10, 100, 40).rate(read=50, gemm=10) == 10 / 4
    assert Work(10, 100, 40).rate(read=10, gemm=10) == 10 / 10


ARGUMENTS = ["--seqs", "2,3", "--length", "40", "--waiting", "5", "--long", "64", "--steps", "4"]


def test_scheduler_prints_every_part_of_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    before = vars(ShardScheduler).copy()
    assert scheduler.main([*ARGUMENTS, "--json"]) == 0
    found = lines(capsys.readouterr().out)
    parts: dict[str, list[str]] = {}
    for line in found[:-1]:
        parts.setdefault(line["case"], []).append(line["part"])
        assert line["median_us"] >= 0 and line["kiloloops"] >= 0
    every = ["step", *(name for name, _, _ in scheduler.PARTS)]
    assert parts == {
        "2 x 40, sharing on": every,
        "2 x 40, sharing off": every,
        "3 x 40, sharing on": every,
        "3 x 40, sharing off": every,
        "2 x 40, sharing on, in lockstep": ["step"],
        "2 x 40, sharing on, 5 wait for a slot": every,
        "2 x 40, sharing on, 5 wait for pages": every,
        "2 x 40, sharing on, 5 wait for pages behind 64 cached tokens": every,
        "2 x 40, on each rank": ["TableMirror.apply", "TableMirror.batch"],
        "a prompt of 64 tokens whose pages are cached": ["hash", "look up", "admitting step"],
    }
    assert (found[-1]["case"], found[-1]["part"]) == ("calibration", "loop") and found[-1]["ns_per_turn"] > 0
    assert vars(ShardScheduler) == before  # no timer stays behind


def test_scheduler_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert scheduler.main(ARGUMENTS) == 0
    text = capsys.readouterr().out
    blocks = text.strip().split("\n\n")
    assert [block.split("  ")[0] for block in blocks[:2]] == ["2 x 40, sharing on", "2 x 40, sharing off"]
    assert len(blocks) == 11 and blocks[-1].startswith("one turn of the trivial loop: ")
    assert len(blocks[0].splitlines()) == 2 + len(scheduler.PARTS)


def test_the_steady_state_is_what_the_case_says() -> None:
    case = scheduler.Case(3, 60, waiting=4, wants="pages", shared_prefix=64)
    shard = scheduler.Shard(case, 10)
    for _ in range(10):
        plan = shard.step()
        assert len(plan.sample_row) == plan.num_tokens == 3
    assert shard.scheduler.num_waiting == 4 and len(shard.scheduler.running) == 3
    assert [s.num_computed - s.prompt_length for s in shard.scheduler.running] == [11, 11, 11]
    shard.scheduler.check()


def test_the_service_beside_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--streams", "3", "--longest", "8", "--pairs", "1", "--firsts", "1", "--threads", "1", "--json"]
    assert service.main(few) == 0
    (line,) = lines(capsys.readouterr().out)
    assert line["tokens"] == sum(each["max_tokens"] for each in service.requests(3, 8))
    assert set(line["service_cpu"]) == {"client", "scheduler", "keeper", "front", "worker"}
    assert line["ratio"] > 0 and line["first_over_grpc_ms"] > 0


def test_a_prediction_is_judged_by_the_state_of_memory_that_its_turns_had() -> None:
    case = predictions.Case("T=2:decode:8", "any")
    found = [predictions.Turn(2.0, 4.0, 80.0), predictions.Turn(3.0, 3.0, 50.0), predictions.Turn(3.0, 2.0, 60.0)]
    fast, slow = predictions.lines(case, found, 40.0)
    assert (fast["memory_keeps_up"], fast["turns"], fast["off"]) == (True, 1, -0.5)
    assert (slow["memory_keeps_up"], slow["turns"], slow["off"]) == (False, 2, 0.25)
    (one,) = predictions.lines(predictions.Case("T=1:decode:8", "any"), found, 40.0)
    assert (one["memory_keeps_up"], one["turns"], one["predicted_ms"]) == (None, 3, 3000.0)


def test_predictions_are_made_of_the_work_that_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["T=1:decode:2", "T=1:prefill:2x40"]
    arguments = ["--model", str(folder), "--hardware", "cpu-zen5-2core", "--turns", "2", "--json"]
    assert predictions.main([*arguments, "--cases", ",".join(cases)]) == 0
    for line in lines(capsys.readouterr().out):  # none of a case in whose turns memory changed
        assert line["case"] in cases and line["turns"] in (1, 2)
        assert line["measured_ms"] > 0 and line["predicted_ms"] > 0
