"""The command line on a tiny model with random weights: the lines that come out, and what stops it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.models.tiny_llama import make_tiny_llama

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    return str(folder)


SMALL = ("--max-model-len", "256", "--num-gpu-blocks-override", "128", "--threads", "1")


def generate(
    capsys: Capture, model: str, requests: Sequence[dict[str, Any] | str], *flags: str
) -> list[dict[str, Any]]:
    """The result lines of a batch in which every request is fine."""
    code, lines = run(capsys, model, requests, *flags)
    assert code == 0
    return lines


def run(
    capsys: Capture, model: str, requests: Sequence[dict[str, Any] | str], *flags: str
) -> tuple[int, list[dict[str, Any]]]:
    path = Path(model).parent / "requests.jsonl"
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in requests))
    capsys.readouterr()
    code = main(["generate", model, "--prompts", str(path), "--json", *SMALL, *flags])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def tokens(lines: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
    return [[output["token_ids"] for output in line["outputs"]] for line in lines]


GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def test_a_batch_answers_every_form_of_prompt_in_order(capsys: Capture, model: str) -> None:
    talk = [{"role": "user", "content": "What is a page?"}]
    lines = generate(
        capsys,
        model,
        [
            GREEDY | {"prompt": "Once upon a time", "request_id": "first"},
            GREEDY | {"messages": talk, "max_tokens": 3},
            GREEDY | {"prompt_token_ids": [40, 41, 42]},
        ],
    )
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert [set(line) for line in lines] == [{"index", "request_id", "prompt_tokens", "cached_tokens", "outputs"}] * 3
    assert (lines[0]["request_id"], lines[2]["prompt_tokens"]) == ("first", 3)
    assert [len(ids) for [ids] in tokens(lines)] == [8, 3, 8]
    for line in lines:
        [output] = line["outputs"]
        assert set(output) == {"index", "token_ids", "text", "finish_reason", "stop_reason", "pages"}
        assert (output["index"], output["finish_reason"], output["stop_reason"]) == (0, "length", None)
        written = line["prompt_tokens"] + len(output["token_ids"])
        # the last token is never written: nothing comes after it
        assert len(output["pages"]) in {-(-written // 16), -(-(written - 1) // 16)}
        assert len({tuple(page) for page in output["pages"]}) == len(output["pages"])
        assert all(device == 0 and 0 <= block < 128 for device, block in output["pages"])


def test_the_tokens_are_those_of_transformers(capsys: Capture, model: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompts = [[5, 6, 7], list(range(40, 90)), [300] * 17]
    lines = generate(capsys, model, [GREEDY | {"prompt_token_ids": prompt} for prompt in prompts])
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for prompt, [found] in zip(prompts, tokens(lines), strict=True):
        wanted = reference.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found == wanted[0, len(prompt) :].tolist()


def test_a_bad_line_is_answered_in_its_place_and_the_others_do_not_notice(capsys: Capture, model: str) -> None:
    good = GREEDY | {"prompt": "The memory of a machine"}
    alone = tokens(generate(capsys, model, [good]))
    code, lines = run(
        capsys,
        model,
        [
            good,
            "{not json",
            good | {"top_p": 0},
            {"max_tokens": 3},
            good | {"prompt_token_ids": [1]},
            good | {"block_ids": [1]},
            {"prompt_token_ids": [-1]},
            {"prompt_token_ids": []},
            {"prompt_token_ids": [5] * 300},
            good | {"temperature": float("nan")},
            good,
        ],
    )
    assert code == 1
    assert [line["index"] for line in lines] == list(range(11))
    assert tokens([lines[0]]) == tokens([lines[-1]]) == alone
    errors = [line["error"] for line in lines[1:-1]]
    assert {error["code"] for error in errors} == {"INVALID_ARGUMENT"}
    assert [error["field"] for error in errors[:2]] == ["line 2", "top_p"]
    for error, name in zip(errors, ["line 2", "top_p", "prompt", "prompt", "block_ids"], strict=False):
        assert name in error["message"]
    assert all(error["message"] and "\n" not in error["message"] for error in errors)


def test_a_common_prefix_lies_in_the_same_pages(capsys: Capture, model: str) -> None:
    prefix = list(range(100, 164))
    requests = [GREEDY | {"prompt_token_ids": prefix + own} for own in ([5, 6], [7, 8, 9])]
    shared = generate(capsys, model, requests)
    first, second = (line["outputs"][0]["pages"] for line in shared)
    assert first[:4] == second[:4]
    assert first[4] != second[4]
    assert [line["cached_tokens"] for line in shared] == [0, 64]
    apart = generate(capsys, model, requests, "--no-enable-prefix-caching")
    pages = [tuple(page) for line in apart for page in line["outputs"][0]["pages"]]
    assert len(set(pages)) == len(pages) == 10
    assert [line["cached_tokens"] for line in apart] == [0, 0]
    assert tokens(shared) == tokens(apart)


def test_samples_of_one_prompt_share_its_full_pages(capsys: Capture, model: str) -> None:
    request = {"prompt_token_ids": list(range(60, 100)), "n": 3, "seed": 7, "max_tokens": 6, "ignore_eos": True}
    [line] = generate(capsys, model, [request])
    assert [output["index"] for output in line["outputs"]] == [0, 1, 2]
    tables = [output["pages"] for output in line["outputs"]]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({tuple(table[2]) for table in tables}) == 3
    assert len({tuple(ids) for [*samples] in tokens([line]) for ids in samples}) == 3
    assert tokens(generate(capsys, model, [request])) == tokens([line])


def test_sampling_flags_are_defaults_that_a_line_may_change(capsys: Capture, model: str) -> None:
    flags = ("--temperature", "0", "--max-tokens", "4", "--ignore-eos", "--logprobs", "2", "--stop-token-ids", "501")
    lines = generate(capsys, model, [{"prompt_token_ids": [5]}, {"prompt_token_ids": [5], "max_tokens": 2}], *flags)
    assert [len(ids) for [ids] in tokens(lines)] == [4, 2]
    for line in lines:
        [output] = line["outputs"]
        assert len(output["logprobs"]) == len(output["token_ids"])
        for token, entry in zip(output["token_ids"], output["logprobs"], strict=True):
            assert entry["rank"] == 1
            assert entry["top"][0] == [token, entry["logprob"]]
            assert len(entry["top"]) == 2
        assert output["cumulative_logprob"] == pytest.approx(sum(entry["logprob"] for entry in output["logprobs"]))


def test_output_goes_to_a_file_and_text_is_for_people(capsys: Capture, model: str, tmp_path: Path) -> None:
    argv = ["generate", model, "--prompt", "A book", "--prompt", "A page", "--max-tokens", "4", "--temperature", "0"]
    out = tmp_path / "out.txt"
    assert main([*argv, *SMALL, "--output", str(out)]) == 0
    text, err = capsys.readouterr()
    assert text == ""
    assert "quire: not default: max_model_len=256 (--max-model-len)" in err
    assert "quire: 2 requests, 0 failed; 8 tokens in " in err
    assert out.read_text().startswith("[0] ")
    assert "\n[1] " in out.read_text()


_NOTHING = "--prompts: nothing to do; give --prompts FILE with at least one line, or --prompt TEXT"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ((), _NOTHING),
        (("--prompts", "/dev/null/x"), "--prompts: cannot read /dev/null/x: Not a directory"),
        (("--prompts", "/dev/null"), _NOTHING),
        (("--prompt", "a", "--output", "/dev/null/x"), "--output: cannot write /dev/null/x: Not a directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_or_written_stops_before_the_model_loads(
    argv: tuple[str, ...], line: str, capsys: Capture
) -> None:
    assert main(["generate", "/no/such/model", *argv]) == 2
    assert capsys.readouterr() == ("", f"quire: error: {line}\n")


def one_line(capsys: Capture, *argv: str) -> tuple[int, str]:
    code = main(["generate", *argv])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("quire: error: ")]
    assert (out, len(lines)) == ("", 1)
    assert err.endswith(lines[0] + "\n")
    return code, lines[0]


def test_a_model_folder_that_is_none_is_one_line(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder, named in (("absent", "absent"), ("empty", "config.json")):
        code, line = one_line(capsys, folder, "--prompt", "a")
        assert code == 1
        assert named in line


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--num-gpu-blocks-override", "16000000"), ("num_gpu_blocks_override", "16000000")),
        (("--kv-cache-memory-bytes", "1000TiB"), ("kv_cache_memory_bytes",)),
        (("--kv-cache-memory-bytes", "1KiB"), ("kv_cache_memory_bytes",)),
        (("--max-model-len", "1024", "--num-gpu-blocks-override", "4"), ("max_model_len", "1024", "64")),
        (("--max-model-len", "99999"), ("max_model_len", "99999", "4096")),
        (("--max-num-seqs", "100", "--max-num-batched-tokens", "100"), ("max_num_batched_tokens", "116")),
    ],
)
def test_what_does_not_fit_is_refused_with_the_computed_numbers(
    capsys: Capture, model: str, flags: tuple[str, ...], names: tuple[str, ...], dry: tuple[str, ...]
) -> None:
    code, line = one_line(capsys, model, "--prompt", "a", *flags, *dry)
    assert code == 2
    for name in names:
        assert name in line


def test_a_dry_run_prints_the_plan_and_loads_no_weights(capsys: Capture, model: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((Path(model) / name).read_bytes())
    assert main(["generate", str(tmp_path), "--num-gpu-blocks-override", "300", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "300" in out
    assert "4800" in out.replace(",", "")


def test_chat_answers_each_turn_of_a_pipe(capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a page?\n\n/clear\nWhat is a page?\nAnd a book?\n"))
    flags = ("--temperature", "0", "--max-tokens", "5", "--stop", "\n", "--system", "Answer in one short sentence.")
    assert main(["chat", model, *SMALL, *flags]) == 0
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[1]
    assert "> " not in err


def test_chat_goes_on_after_a_turn_that_may_not_be(
    capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'page ' * 400}\nWhat is a page?\n"))
    assert main(["chat", model, *SMALL, "--temperature", "0", "--max-tokens", "5", "--stop", "\n"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert err.count("quire: error: ") == 1


def test_bench_prints_a_json_line_for_each_case(capsys: Capture, model: str) -> None:
    argv = ["bench", "--model", model, "--case", "prefill:64,decode:2", "--threads", "1", "--repeats", "2", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.bench.VOCAB_HIGH", 400)
        assert main([*argv, "--num-gpu-blocks-override", "256", "--warmups", "0"]) == 0
    prefill, decode = map(json.loads, capsys.readouterr().out.splitlines())
    assert (prefill["case"], decode["case"]) == ("prefill:64", "decode:2")
    for line in (prefill, decode):
        assert (line["peer"], line["model"], line["threads"], line["unit"]) == ("quire", "tiny", 1, "tok/s")
        assert line["dtype"] == "float32"
        assert len(line["runs"]) == len(line["foreign"]) == 2
        assert min(line["value"], line["ttft_p50"], line["ttft_p99"], line["cpu_s"], line["per_cpu_s"]) > 0


def test_the_process_reads_a_pipe_and_exits_with_the_code(model: str) -> None:
    command = [sys.executable, "-m", "launch.cli", "generate", model, "--prompts", "-", "--json", *SMALL]
    lines = json.dumps(GREEDY | {"prompt": "A page"}) + "\nnull\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 1, done.stderr
    good, bad = map(json.loads, done.stdout.splitlines())
    assert len(good["outputs"][0]["token_ids"]) == 8
    assert bad["error"]["field"] == "line 2"
    assert "Traceback" not in done.stderr
