"""The configuration: where values come from, what is refused, and how the refusal reads (RELIABILITY B55-57)."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.cli import build_parser, main
from launch.config import DEFAULTS, SETTINGS, EngineConfig, parse_size, show_size
from launch.flags import Effective, effective, flag_of
from launch.machine import available_cores, available_memory, has_whole_cores
from pagetable.errors import ConfigError


def read(*argv: str, env: Mapping[str, str] | None = None) -> Effective:
    return effective(build_parser().parse(["generate", *argv]), env or {})


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refusal leaves on stderr."""
    code = main(["generate", *argv])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("quire: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.removeprefix("quire: error: ").rstrip("\n")


def test_defaults_are_the_ones_that_the_documents_name() -> None:
    config = EngineConfig("m")
    assert dataclasses.asdict(config) == {
        "model": "m",
        "max_model_len": None,
        "block_size": 16,
        "num_gpu_blocks_override": None,
        "kv_cache_memory_bytes": None,
        "preallocate_kv_cache": False,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 1024,
        "max_num_partial_prefills": 8,
        "enable_prefix_caching": True,
        "deterministic": False,
        "async_scheduling": False,
        "device": "auto",
        "dtype": "auto",
        "kv_cache_dtype": "auto",
        "seed": 0,
        "threads": None,
        "pin_threads": True,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "page_parallel_size": 1,
        "data_parallel_size": 1,
        "table_broadcast": "auto",
    }
    assert read("m") == Effective(config, {name: "argument" if name == "model" else "default" for name in SETTINGS})


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("block-size: 1\nseed: 1\nmax_num_seqs: 1\n")
    env = {"QUIRE_BLOCK_SIZE": "2", "QUIRE_SEED": "2", "HOME": "/"}
    found = read("m", "--config", str(file), "--block-size", "4", env=env)
    assert (found.config.block_size, found.config.seed, found.config.max_num_seqs, found.config.dtype) == (
        4,
        2,
        1,
        "auto",
    )
    assert {name: found.origins[name] for name in ("block_size", "seed", "max_num_seqs", "dtype")} == {
        "block_size": "--block-size",
        "seed": "QUIRE_SEED",
        "max_num_seqs": str(file),
        "dtype": "default",
    }
    assert found.changed() == ["block_size=4 (--block-size)", f"max_num_seqs=1 ({file})", "seed=2 (QUIRE_SEED)"]


def test_the_file_and_the_model_may_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("kv-cache-memory-bytes: 1.5GiB\nenable-prefix-caching: no\nthreads: 3\n")
    config = read(env={"QUIRE_CONFIG": str(file), "QUIRE_MODEL": "m"}).config
    assert (config.model, config.kv_cache_memory_bytes) == ("m", 3 << 29)
    assert (config.enable_prefix_caching, config.num_threads) == (False, 3)


def test_what_print_config_prints_is_a_file_that_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "m: #x",
        "--kv-cache-memory-bytes",
        "512MB",
        "--no-enable-prefix-caching",
        "--threads",
        "2",
        "--dtype",
        "bfloat16",
    ]
    assert main(["generate", *argv, "--print-config"]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert "kv-cache-memory-bytes: 512MB  # --kv-cache-memory-bytes\n" in text
    assert "block-size: 16  # default\n" in text
    assert "#   max_n: 16\n" in text
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert read("--config", str(file)).config == read(*argv).config


@pytest.mark.parametrize(("short", "long"), [("-tp", "--tensor-parallel-size"), ("-pp", "--pipeline-parallel-size")])
def test_parallel_sizes_have_their_short_flags(short: str, long: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("m", short, "1") == read("m", long, "1")
    assert getattr(read("m", short, "2").config, long[2:].replace("-", "_")) == 2
    assert refused(capsys, "m", short, "0") == f"{long}: got 0, must be a whole number from 1 to 1024"


def test_groups_divide_the_ranks_that_they_are_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    both = ("--tensor-parallel-size", "4", "--page-parallel-size", "3")
    assert refused(capsys, "m", *both).startswith("page_parallel_size: got 3, must divide tensor_parallel_size (4)")
    layout = read("m", "-tp", "4", "-pp", "2", "--page-parallel-size", "2").config.layout
    assert (layout.tensor, layout.pipeline, layout.page, layout.num_ranks) == (4, 2, 2, 8)


def test_replicas_have_their_short_flag_and_are_for_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("m", "-dp", "2").config == EngineConfig("m", data_parallel_size=2)
    assert main(["generate", "m", "-dp", "2", "--prompt", "x"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "quire: error: data_parallel_size: got 2, must be 1; replicas are for `quire serve`"
    )
    assert refused(capsys, "m", "-dp", "0") == "--data-parallel-size: got 0, must be a whole number from 1 to 1024"


_UNITS = "B, KiB, MiB, GiB, TiB, KB, MB, GB, TB"
_SIZES = "1, 2, 4, 8, 16, 32, 64, 128, 256"
_LEAVE = "leave it out to let the engine decide"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--block-size", "0"], f"--block-size: got 0, must be one of {_SIZES}"),
        (["--block-size", "3"], f"--block-size: got 3, must be one of {_SIZES}"),
        (["--block-size", "512"], f"--block-size: got 512, must be one of {_SIZES}"),
        (["--block-size", "16.0"], f"--block-size: got '16.0', must be one of {_SIZES}"),
        (["--block-size", "1_6"], f"--block-size: got '1_6', must be one of {_SIZES}"),
        (["--num-gpu-blocks-override", "0"],
         f"--num-gpu-blocks-override: got 0, must be a whole number from 1 to 16777216; {_LEAVE}"),
        (["--num-gpu-blocks-override", "16777217"],
         f"--num-gpu-blocks-override: got 16777217, must be a whole number from 1 to 16777216; {_LEAVE}"),
        (["--max-model-len", "-1"],
         f"--max-model-len: got -1, must be a whole number from 1 to 2147483647; {_LEAVE}"),
        (["--max-num-seqs", "99999999999999999999"],
         "--max-num-seqs: got 99999999999999999999, must be a whole number from 1 to 16384"),
        (["--max-num-seqs", "many"], "--max-num-seqs: got 'many', must be a whole number from 1 to 16384"),
        (["--max-num-batched-tokens", "0"],
         "--max-num-batched-tokens: got 0, must be a whole number from 1 to 1048576"),
        (["--max-num-partial-prefills", "0"],
         "--max-num-partial-prefills: got 0, must be a whole number from 1 to 1024"),
        (["--seed", "9223372036854775808"],
         "--seed: got 9223372036854775808, must be a whole number from 0 to 9223372036854775807"),
        (["--threads", "0"], f"--threads: got 0, must be a whole number from 1 to 1024; {_LEAVE}"),
        (["--dtype", "float16"], "--dtype: got 'float16', must be one of auto, float32, bfloat16"),
        (["--kv-cache-memory-bytes", "16"],
         f"--kv-cache-memory-bytes: got '16', must be a size with a unit ({_UNITS}); say which unit, e.g. 16GiB"),
        (["--kv-cache-memory-bytes", "4 parsecs"],
         f"--kv-cache-memory-bytes: got '4 parsecs', must be a size with a unit ({_UNITS});"
         " write for example 4GiB or 512MiB"),
        (["--kv-cache-memory-bytes", "0GiB"], f"--kv-cache-memory-bytes: got 0, must be from 1B to 1024TiB; {_LEAVE}"),
        (["--kv-cache-memory-bytes", "1GiB", "--num-gpu-blocks-override", "5"],
         "num_gpu_blocks_override: got 5, must stand without kv_cache_memory_bytes;"
         " both size the pool: drop one of the two"),
        (["--bock-size", "16"], "--bock-size: no such flag; did you mean --block-size?"),
        (["--gpu-memory", "16"], "--gpu-memory: no such flag; quire generate --help lists what there is"),
        (["--block", "16"], "--block: no such flag; did you mean --block-size?"),
        (["extra"], "extra: no such argument; quire generate --help lists what there is"),
        (["--seed"], "argument --seed: expected one argument; quire generate --help lists what there is"),
        (["--temperature", "hot"],
         "argument --temperature: invalid float value: 'hot'; quire generate --help lists what there is"),
        (["--max-tokens", "1.5"],
         "argument --max-tokens: invalid int value: '1.5'; quire generate --help lists what there is"),
    ],
)  # fmt: skip
def test_a_bad_flag_is_one_line(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "m", *argv) == line


_TWICE = "must stand once in the file; drop one of the two lines"
_PLAIN = "must be a plain YAML value; drop the tag; tags are never acted on"
_TAG = "tag:yaml.org,2002:python"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("block-sise: 16",
         "block-sise: got 'line 1 of {}', must be a key of the configuration; did you mean block_size?"),
        ("block-size: 16\nblock-size: 16",
         "block-size: got 'line 2 of {}', " + _TWICE),
        ("block-size: 16\nblock_size: 32",
         "block_size: got 'line 2 of {}', " + _TWICE),
        ("block-size: '16'", "block-size in {}: got '16', must be one of " + _SIZES),
        ("block-size: true", "block-size in {}: got True, must be one of " + _SIZES),
        ("seed: 1.5", "seed in {}: got 1.5, must be a whole number from 0 to 9223372036854775807"),
        ("seed: null", "seed in {}: got None, must be a whole number from 0 to 9223372036854775807"),
        ("enable-prefix-caching: 1", "enable-prefix-caching in {}: got 1, must be true or false"),
        ("enable-prefix-caching: maybe", "enable-prefix-caching in {}: got 'maybe', must be true or false"),
        ("kv-cache-memory-bytes: 16",
         "kv-cache-memory-bytes in {}: got '16', must be a size with a unit (" + _UNITS + ");"
         " say which unit, e.g. 16GiB"),
        ("dtype: [bfloat16]", "dtype: got 'a sequence in line 1 of {}', must be a single plain value"),
        ("seed: !!python/object/apply:os.getpid []",
         "seed: got '" + _TAG + "/object/apply:os.getpid', " + _PLAIN),
        ("seed: !!python/name:os.getpid", "seed: got '" + _TAG + "/name:os.getpid', " + _PLAIN),
        ("seed: !mine 5", "seed: got '!mine', " + _PLAIN),
        ("seed: !!int abc", "seed: got 'abc', must be a plain YAML value (line 1 of {})"),
        ("- seed", "--config: got '{}', must hold one mapping of keys to values; write lines like `block-size: 16`"),
        ("tensor-parallel-size: 0", "tensor-parallel-size in {}: got 0, must be a whole number from 1 to 1024"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_names_the_key(
    text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    assert refused(capsys, "m", "--config", "c.yaml") == line.format("c.yaml")


def test_a_file_that_is_no_yaml_or_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("seed: [1\n")
    assert refused(capsys, "m", "--config", "c.yaml").startswith("--config: got 'c.yaml', must be YAML (line 2: ")
    Path("c.yaml").write_bytes(b"seed: \xff")
    assert refused(capsys, "m", "--config", "c.yaml") == "--config: got 'c.yaml', must be UTF-8 text"
    Path("c.yaml").write_text("#" * (1 << 20) + "\n")
    assert (
        refused(capsys, "m", "--config", "c.yaml") == "--config: got 'c.yaml', must be a file of at most 1048576 bytes"
    )
    gone = "--config: got 'd.yaml', must be a file that can be read; No such file or directory"
    assert refused(capsys, "m", "--config", "d.yaml") == gone
    Path("c.yaml").write_text("# nothing\n")
    assert read("m", "--config", "c.yaml").config == EngineConfig("m")


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("QUIRE_BLOCK_SIZE", "3", f"QUIRE_BLOCK_SIZE: got 3, must be one of {_SIZES}"),
        ("QUIRE_BLOCKSIZE", "16",
         "QUIRE_BLOCKSIZE: got '16', must be a variable that Quire knows; did you mean QUIRE_BLOCK_SIZE?"),
        ("QUIRE_ENABLE_PREFIX_CACHING", "maybe", "QUIRE_ENABLE_PREFIX_CACHING: got 'maybe', must be true or false"),
        ("QUIRE_SEED", "", "QUIRE_SEED: got '', must be a whole number from 0 to 9223372036854775807"),
        ("QUIRE_MODEL", "", "QUIRE_MODEL: got '', must be a text that is not empty"),
    ],
)  # fmt: skip
def test_a_bad_variable_is_one_line(
    variable: str, value: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert refused(capsys, *([] if variable == "QUIRE_MODEL" else ["m"])) == line


def test_without_a_model_nothing_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys) == (
        "model: missing, must be the folder of a Hugging Face model; give it on the command line or as QUIRE_MODEL"
    )


@pytest.mark.parametrize("argv", [["-tp", "0"], ["--blok-size", "1"], ["--config", "/dev/null/x"]])
def test_a_refusal_of_a_real_process_is_quick_and_one_line(argv: list[str]) -> None:
    command = [sys.executable, "-m", "launch.cli", "generate", "m", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"HOME": "/"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"quire: error: {'--tensor-parallel-size' if argv[0] == '-tp' else argv[0]}: ")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom launch.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'transformers', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    for name in SETTINGS:
        assert name == "model" or flag_of(name) in done.stdout


@pytest.mark.parametrize("wrong", [True, 16.0, "16", None])
def test_python_callers_are_held_to_the_same_types(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"^block_size: got "):
        EngineConfig("m", block_size=wrong)  # type: ignore[arg-type]


def test_python_callers_give_bytes_as_a_number() -> None:
    assert EngineConfig("m", kv_cache_memory_bytes=4 << 30).kv_cache_memory_bytes == 4 << 30
    with pytest.raises(ConfigError, match="give bytes as an int"):
        EngineConfig("m", kv_cache_memory_bytes="4GiB")  # type: ignore[arg-type]


def test_every_default_is_allowed_and_every_field_has_a_help() -> None:
    for name, known in SETTINGS.items():
        assert known.help
        if name != "model":
            known.check(name, DEFAULTS[name])


@pytest.mark.parametrize(
    ("text", "count"),
    [("1B", 1), ("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5kib", 1536), ("0.001KB", 1)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size("x", text) == count
    assert parse_size("x", show_size(count)) == count


def _cgroup(root: Path, lines: str, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": lines, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3),
        ("0::/not/mounted/here\n", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ("3:memory:/x\n2:cpu,cpuacct:/x\n", {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000\n",
                                             "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, 4),
        ("2:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                       "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
    ],
)  # fmt: skip
def test_cores_are_the_affinity_cut_by_the_quotas(
    tmp_path: Path, lines: str, files: Mapping[str, str], cores: int
) -> None:
    assert available_cores(_cgroup(tmp_path, lines, files), affinity=8) == cores


def test_threads_have_whole_cores_where_no_quota_shares_them(tmp_path: Path) -> None:
    root = _cgroup(tmp_path, "0::/\n", {})
    assert [has_whole_cores(count, root, affinity=8) for count in (1, 8, 9)] == [True, True, False]
    _cgroup(root, "0::/\n", {"sys/fs/cgroup/cpu.max": "700000 100000\n"})
    assert not has_whole_cores(1, root, affinity=8) and has_whole_cores(7, root, affinity=7)


@pytest.mark.parametrize(
    ("fields", "num_ranks", "threads", "pins"),
    [
        ({"tensor_parallel_size": 2}, 2, 1, True),
        ({"tensor_parallel_size": 2}, 4, 1, True),  # two shards
        ({"tensor_parallel_size": 2}, 2, 4, False),
        ({"tensor_parallel_size": 2, "pin_threads": False}, 2, 1, False),
        ({}, 1, 1, False),  # who is alone talks to nobody
    ],
)
def test_ranks_stay_on_cores_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], num_ranks: int, threads: int, pins: bool
) -> None:
    monkeypatch.setattr("launch.config.has_whole_cores", lambda count: count <= 4)
    assert EngineConfig("m", **fields).pins(num_ranks, threads) == pins


def test_memory_is_what_is_free_cut_by_the_room_in_the_cgroup(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    root = _cgroup(tmp_path, "0::/a\n", {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   1000 kB\n"})
    assert available_memory(root) == 1000 * 1024
    group = {"memory.max": "900000\n", "memory.current": "700000\n", "memory.stat": "anon 1\ninactive_file 50000\n"}
    _cgroup(root, "0::/a\n", {f"sys/fs/cgroup/a/{name}": text for name, text in group.items()})
    assert available_memory(root) == 250000


def test_the_machine_under_the_tests_has_cores_and_memory() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    assert (available_memory() or 0) > 1 << 20
