"""`quire plan`: what it prints, what it refuses, and that the figures in the docs are its own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from kernels import ops
from kernels.cpu import Native
from launch import measure
from launch.cli import main
from launch.flags import Parser
from launch.hardware_file import FOLDER, known_hardware, read_hardware, to_yaml
from launch.plan import Question, add_plan_flags
from pagetable.cost import Ways
from pagetable.errors import ConfigError
from worker.layout import Layout
from worker.model_config import ModelConfig

Capture = pytest.CaptureFixture[str]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "plan.md"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "mid.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def plan(capsys: Capture, *argv: object) -> dict[str, Any]:
    assert main(["plan", *map(str, argv), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: Capture, *argv: object) -> str:
    assert main(["plan", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


ASKED = ("--devices", 4, "--context", 1024, "--batch", 8)
SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "page_parallel_size", "data_parallel_size")


def test_every_layout_uses_all_devices_and_can_be_and_the_best_comes_first(capsys: Capture, model: str) -> None:
    found = plan(capsys, model, *ASKED, "--hardware", "h200", "--top", 100)
    # of 14 query heads no four ranks can own equal parts
    assert {tuple(each[name] for name in SIZES) for each in found["layouts"]} == {
        *((1, 1, 1, 4), (1, 2, 1, 2), (1, 4, 1, 1)),
        *((2, 1, 1, 2), (2, 2, 1, 1), (2, 1, 2, 2), (2, 2, 2, 1)),
    }
    assert found["fitting"] == 7
    rates = [each["decode_tokens_per_s"] for each in found["layouts"]]
    assert rates[0] == max(rates)


def _folder(config: Path) -> Path:
    """A folder with nothing but a config.json."""
    folder = config.parent / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(config.read_text())
    return folder


def test_a_folder_and_its_config_alone_are_one_model(capsys: Capture, model: str) -> None:
    by_file = plan(capsys, model, *ASKED)
    by_folder = plan(capsys, _folder(Path(model)), *ASKED)
    assert by_file["layouts"] == by_folder["layouts"]


def test_goals_sort_by_what_they_name(capsys: Capture, model: str) -> None:
    def best(goal: str, key: str) -> list[float]:
        return [each[key] for each in plan(capsys, model, *ASKED, "--goal", goal, "--top", 100)["layouts"]]

    def rounded(values: list[float]) -> list[float]:
        return [float(f"{value:.3g}") for value in values]

    assert rounded(best("prefill", "prefill_tokens_per_s")) == sorted(
        rounded(best("prefill", "prefill_tokens_per_s")), reverse=True
    )
    assert rounded(best("ttft", "ttft_s")) == sorted(rounded(best("ttft", "ttft_s")))


def test_sizes_that_are_given_hold(capsys: Capture, model: str) -> None:
    found = plan(capsys, model, *ASKED, "-tp", 2, "--page-parallel-size", 2)
    assert {tuple(each[name] for name in SIZES) for each in found["layouts"]} == {(2, 1, 2, 2), (2, 2, 2, 1)}


def test_the_table_names_the_model_the_hardware_and_the_flags(capsys: Capture) -> None:
    assert main(["plan", "story", "--devices", "1", "--context", "512", "--batch", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Predicted, not measured: story (bfloat16) on 1 x cpu-zen5-2core, 4 sequences of 512 tokens"
    assert lines[1].split() == [
        *"TPGD",
        *("decode", "tok/s", "step", "ms", "prefill", "tok/s", "TTFT", "s", "memory"),
    ]
    assert lines[2].split()[:4] == ["1", "1", "1", "1"]
    assert lines[-1] == "suggested: --tensor-parallel-size 1"


def test_a_context_that_serve_would_refuse_is_noted(capsys: Capture) -> None:
    assert main(["plan", "story", "--devices", "1", "--context", "2048", "--batch", "1"]) == 0
    note = "note: the model's max_position_embeddings is 1024; `quire serve` refuses longer sequences"
    assert capsys.readouterr().out.splitlines()[-1] == note


def test_bytes_of_weights_and_pages_are_those_of_the_layout(capsys: Capture, model: str) -> None:
    [each] = plan(capsys, model, "--devices", 2, "--context", 1000, "--batch", 3, "-tp", 2)["layouts"][:1]
    config = ModelConfig.from_folder(_folder(Path(model)))
    part = Layout(2, 1, each["page_parallel_size"]).part(config, 0)
    pages = -(-3 * 63 // each["page_parallel_size"])
    assert each["memory_bytes"]["pages"] == pages * part.block_bytes(16, 128)
    assert each["memory_bytes"]["weights"] == part.weight_bytes(config, 2)


def test_stages_are_those_of_the_layout(model: str) -> None:
    """Two of shape mid: the first ends inside an MLP, in units of its two tensor ranks."""
    parser = Parser()
    add_plan_flags(parser)
    asked = [model, "--devices", "4", "--context", "1000", "--batch", "3"]
    first, last = Question.of(parser.parse_args(asked)).cost(Ways(2, 2)).stages
    assert (len(first.windows), first.mlp, first.left_mlp, first.carried_mlp) == (13, 2432, 2432 - 1760, 0)
    assert (len(last.windows), last.mlp, last.left_mlp, last.carried_mlp) == (11, 2432, 0, 2432 - 1760)
    assert first.mlp_rows(is_prefill=False) == first.mlp_rows(is_prefill=True) == 12 * 2432 + 1760


def test_a_decode_and_a_chunk_of_a_prompt_are_done_on_either_side_of_a_border(model: str) -> None:
    """Two of shape mid, each one rank: 12 sixteenths of the MLP are the first stage's in a decode, one in a prefill."""
    parser = Parser()
    add_plan_flags(parser)
    asked = [model, "--devices", "2", "--context", "1000", "--batch", "3"]
    first, last = Question.of(parser.parse_args(asked)).cost(Ways(1, 2)).stages
    assert [first.mlp_rows(is_prefill) for is_prefill in (False, True)] == [12 * 4864 + 3648, 12 * 4864 + 304]
    assert [last.mlp_rows(is_prefill) for is_prefill in (False, True)] == [12 * 4864 - 3648, 12 * 4864 - 304]


def test_int8_pages_and_float32_change_the_bytes(capsys: Capture, model: str) -> None:
    asked = ("--devices", 1, "--context", 1024, "--batch", 8)

    def pages(*flags: str) -> int:
        found: int = plan(capsys, model, *asked, *flags)["layouts"][0]["memory_bytes"]["pages"]
        return found

    plain = pages()
    assert plain == 8 * 64 * 2 * 24 * 2 * 16 * 128
    assert pages("--kv-cache-dtype", "int8") == plain * (64 + 4) // 128
    assert pages("--dtype", "float32") == 2 * plain


def test_what_cannot_fit_is_refused_with_the_numbers_and_the_devices_that_would_do(capsys: Capture, model: str) -> None:
    asked = (model, "--context", 40000, "--batch", 64)
    text = refused(capsys, *asked, "--devices", 2)
    found = re.search(r"must hold ([0-9.]+) GiB on a device at least: .*; take (\d+) devices", text)
    assert found is not None, text
    assert "weights" in text and "pages for 64 x 40000 tokens" in text and "one of cpu-zen5-2core has 1" in text
    assert float(found[1]) > read_hardware("cpu-zen5-2core").memory_bytes / 2**30
    enough = int(found[2])
    assert plan(capsys, *asked, "--devices", enough)["fitting"] > 0
    assert "must hold" in refused(capsys, *asked, "--devices", enough // 2)


@pytest.mark.parametrize("flag", ["--devices", "--batch", "--goal", "--block-size", "--tensor-parallel-size"])
def test_measuring_takes_no_flag_of_a_question(capsys: Capture, flag: str) -> None:
    assert refused(capsys, "--measure", flag, "2") == (
        f"quire: error: {flag}: stands without --measure, which asks nothing of a model; drop one of the two\n"
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("", "--devices: missing; say for example `quire plan"),
        ("--devices 2 --context 9", "--batch: missing"),
        ("--devices 0 --context 9 --batch 1", "--devices: got 0, must be a whole number from 1 to 1024"),
        ("--devices two --context 9 --batch 1", "--devices: got 'two', must be a whole number"),
        ("--devices 1 --context 0 --batch 1", "--context: got 0"),
        ("--devices 1 --context 9 --batch 1.5", "--batch: got '1.5'"),
        ("--devices 1 --context 9 --batch 1 --goal joy", "--goal: got 'joy', must be one of decode"),
        ("--devices 1 --context 9 --batch 1 --top 0", "--top: got 0"),
        ("--devices 1 --context 9 --batch 1 --block-size 17", "--block-size: got 17"),
        ("--devices 1 --context 9 --batch 1 --dtype float8", "--dtype: got 'float8'"),
        ("--devices 1 --context 9 --batch 1 --threads 3", "--threads: got 3, must be from 1 to the 2 cores"),
        (
            "--devices 1 --context 9 --batch 1 --hardware h200 --threads 2",
            "--threads: got 2, must be 1 where",
        ),
        ("--devices 1 --context 9 --batch 1 --hardware h900", "--hardware: got 'h900', must be a known hardware"),
        ("--devices 1 --context 9 --batch 1 --output x", "--output: stands with --measure only"),
        ("--devices 1 --context 9 --batch 1 --device 2", "--device: no such flag; did you mean --devices?"),
        ("--devices 3 --context 9 --batch 1 -tp 3", "tensor_parallel_size: got 3, must divide the model's 14"),
        ("--devices 4 --context 9 --batch 8 -tp 2 --page-parallel-size 3", "page_parallel_size: got 3, must divide"),
        ("--devices 3 --context 9 --batch 8 -tp 2", "--devices: got 3, must be a number that --tensor-parallel-size 2"),
        ("--devices 50 --context 9 --batch 1", "--devices: got 50, must be a number that some layout of this model"),
        ("--measure", "MODEL: stands without --measure"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys: Capture, model: str, flags: str, text: str) -> None:
    assert text in refused(capsys, model, *flags.split())


def test_a_model_is_missed_by_name(capsys: Capture, tmp_path: Path) -> None:
    assert "model: missing" in refused(capsys, *ASKED)
    assert main(["plan", str(tmp_path / "none.json"), *map(str, ASKED)]) == 1
    assert "none.json: there is no such file" in capsys.readouterr().err


def test_every_table_is_read_and_written_as_it_is() -> None:
    assert known_hardware() == ["a100", "cpu-zen5-2core", "h100", "h200", "l40s"]
    for name in known_hardware():
        assert read_hardware(name).devices_per_host >= 2


def test_a_table_that_is_written_reads_the_same(tmp_path: Path) -> None:
    for name in known_hardware():
        path = tmp_path / "copy.yaml"
        text = to_yaml(read_hardware(name), {"read_bytes_per_s": "a comment"})
        path.write_text(text)
        assert to_yaml(read_hardware(str(path)), {"read_bytes_per_s": "a comment"}) == text


WHOLE = (FOLDER / "h200.yaml").read_text()


@pytest.mark.parametrize(
    ("was", "becomes", "text"),
    [
        ("kind: gpu", "kin: gpu", "kin: got 'line "),
        ("kind: gpu", "kin: gpu", "did you mean kind?"),
        ("kind: gpu", "kind: gpu\nkind: cpu", "kind: got 'twice in "),
        ("kind: gpu", "", "kind: got None, must stand in "),
        ("kind: gpu", "kind: tpu", "kind: got 'tpu', must be one of cpu, gpu"),
        ("kind: gpu", "kind: 7", "kind: got '7', must be a word"),
        ("devices_per_host: 8", "devices_per_host: 8.5", "devices_per_host: got '8.5', must be a whole number"),
        ("devices_per_host: 8", "devices_per_host: [8]", "devices_per_host: got 'seq', must be a whole number"),
        ("4.3e+12", "4.3e12", "read_bytes_per_s: got '4.3e12', must be a number; write a float as 4.3e+12"),
        ("4.3e+12", "-4.3e+12", "read_bytes_per_s: got -4300000000000.0, must be a finite number above 0"),
        ("4.3e+12", ".nan", "read_bytes_per_s: got nan"),
        ("4.3e+12", "true", "read_bytes_per_s: got 'true'"),
        ("4.3e+12", "!!python/object:os.system 1", "read_bytes_per_s"),
        ("product_flops:\n  1: ", "product_flops: ", "product_flops: got '7.88e+14', must be a mapping"),
        ("  1: 7.88e+14", "  2: 7.88e+14", "product_flops: got [2], must name rates by numbers of rows"),
        ("  1: 7.88e+14", "  x: 7.88e+14", "product_flops: got 'x', must be a whole number"),
        ("kind: gpu", "kind: {gpu", "must be YAML"),
        (WHOLE, "- 1", "must hold one mapping of keys to values"),
        (WHOLE, "", "must hold one mapping of keys to values"),
    ],
)  # fmt: skip
def test_a_table_that_may_not_be_is_refused_by_key(tmp_path: Path, was: str, becomes: str, text: str) -> None:
    path = tmp_path / "table.yaml"
    assert was in WHOLE
    path.write_text(WHOLE.replace(was, becomes, 1))
    with pytest.raises(ConfigError) as refusal:
        read_hardware(str(path))
    assert text in str(refusal.value)


def test_the_figures_in_the_docs_are_what_the_command_prints(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = DOCS.read_text()
    monkeypatch.chdir(tmp_path)
    for name, config in re.findall(r"`(\S+\.json)`:\n\n```json\n(.*?)```", text, re.DOTALL):
        Path(name).write_text(config)
    shown = re.findall(r"^\$ quire (plan \S+\.json .*)\n((?:[^$`].*\n)+)", text, re.MULTILINE)
    assert len(shown) == 9  # 2, 4 and 8 GPUs for three workloads
    for command, printed in shown:
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out == printed, command


@pytest.mark.skipif(not isinstance(ops.default_backend(), Native), reason="constants are those of the native kernels")
def test_measuring_writes_a_table_that_plans(
    capsys: Capture, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_SAMPLES", 1), ("_REPEATS", 1), ("_ROWS", (1, 16)), ("_READ_BYTES", 1 << 24)):
        monkeypatch.setattr(measure, name, value)
    path = tmp_path / "here.yaml"
    assert main(["plan", "--measure", "--output", str(path)]) == 0
    assert "measuring products" in capsys.readouterr().err
    assert [rows for rows, _ in read_hardware(str(path)).product_flops] == [1, 16]
    found = plan(capsys, model, "--devices", 1, "--context", 128, "--batch", 1, "--hardware", path)
    assert found["hardware"] == str(path) and found["layouts"][0]["decode_tokens_per_s"] > 0
