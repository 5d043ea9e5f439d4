"""Rows 55-57, 63 and 65 of RELIABILITY part B: what refuses to start, against the real command line.

Each refusal is one line that names the key or the file (never a path that nobody typed), an exit code that is not 0,
at most 5 s of CPU, bounded memory, and no traceback. One process imports the engine and forks a child for each
case: a child is a process of its own, with its own exit code, CPU limit and peak memory, without the import's second.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.llm import LLM
from launch.models.tiny_llama import make_tiny_llama
from pagetable.errors import ConfigError, ModelError, NotSupported, QuireError

SERVER = """
import json, os, resource, sys, tempfile
import jinja2, torch, tokenizers, launch.llm
from launch.cli import main

def child(order):
    resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, errors="backslashreplace")
    try:
        sys.exit(main(order["argv"]) if order["argv"] else 0)
    except SystemExit as end:
        return end.code
    except BaseException:
        import traceback
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()

for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(child(json.loads(line)))
        _, status, used = os.wait4(pid, 0)
        texts = [os.pread(file.fileno(), 1 << 20, 0).decode("utf-8", "replace") for file in (out, err)]
    print(json.dumps([os.waitstatus_to_exitcode(status), *texts, used.ru_maxrss << 10]), flush=True)
"""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended. `growth`: its peak memory in bytes above that of a process that does nothing."""

    code: int
    out: str
    err: str
    growth: int

    @property
    def line(self) -> str:
        """The only error on stderr; before it nothing but what differs from the defaults may stand."""
        *notes, last = self.err.splitlines()
        assert all(note.startswith("quire: not default: ") for note in notes), self.err
        assert last.startswith("quire: error: ") and self.err.endswith("\n")
        return last.removeprefix("quire: error: ")


class Processes:
    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._least = 0
        self._least = self.run(Path("/"), []).growth

    def run(self, cwd: Path, argv: list[str], env: dict[str, str] | None = None) -> End:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), "env": env or {}}) + "\n")
        self._server.stdin.flush()
        code, out, err, peak = json.loads(self._server.stdout.readline())
        return End(code, out, err, peak - self._least)

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    found.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "m"
    make_tiny_llama(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A good model that a test may spoil, beside requests for it."""
    shutil.copytree(original, tmp_path / "m")
    (tmp_path / "p.jsonl").write_text('{"prompt": "A page", "max_tokens": 2}\n')
    return tmp_path / "m"


GENERATE = ["generate", "m", "--prompts", "p.jsonl", "--json"]


def refused(processes: Processes, folder: Path, *flags: str, code: int, env: dict[str, str] | None = None) -> str:
    """The one line of a start that was refused."""
    end = processes.run(folder.parent, [*GENERATE, *flags], env)
    assert (end.code, end.out) == (code, ""), end
    line = end.line
    assert "Traceback" not in end.err and str(folder.parent) not in line
    assert len(line) < 500
    assert end.growth < 100 * MIB
    return line


def test_the_model_is_served_before_it_is_spoilt(processes: Processes, folder: Path) -> None:
    end = processes.run(folder.parent, [*GENERATE, "--num-gpu-blocks-override", "64"])
    assert end.code == 0, end.err
    assert len(json.loads(end.out)["outputs"][0]["token_ids"]) == 2


# rows 55 to 57: configuration

CONFIGS = [
    ("blok-size: 16", "blok-size", "did you mean block_size?"),
    ("max_model_length: 5", "max_model_length", "did you mean max_model_len?"),
    ("block-size: sixteen", "block-size", "must be one of 1, 2, 4"),
    ("block-size: '16'", "block-size", "must be one of 1, 2, 4"),
    ("block-size: 16.0", "block-size", "must be one of 1, 2, 4"),
    ("max-num-seqs: yes", "max-num-seqs", "a whole number from 1 to 16384"),
    ("max-num-seqs: [1]", "max-num-seqs", "a single plain value"),
    ("seed: 9223372036854775808", "seed", "a whole number from 0 to 9223372036854775807"),
    ("kv-cache-memory-bytes: 16", "kv-cache-memory-bytes", "a size with a unit"),
    ("kv-cache-memory-bytes: 16 GBB", "kv-cache-memory-bytes", "a size with a unit"),
    ("seed: 1\nseed: 2", "seed", "stand once in the file"),
    ("block-size: 16\nblock_size: 16", "block_size", "stand once in the file"),
    ("seed: !!python/object/apply:os.system ['true']", "seed", "be a plain YAML value; drop the tag"),
    ("!!python/name:os.system : 1", "", "be a key of the configuration"),
    ("- seed", "--config", "one mapping of keys to values"),
    ("seed: [", "--config", "be YAML"),
    ("a: &a [*a]", "a", "be a key of the configuration"),
]


@pytest.mark.parametrize(("text", "named", "limit"), CONFIGS, ids=[text for text, _, _ in CONFIGS])
def test_row_55_a_bad_file_of_settings(processes: Processes, folder: Path, text: str, named: str, limit: str) -> None:
    (folder.parent / "c.yaml").write_text(text + "\n")
    line = refused(processes, folder, "--config", "c.yaml", code=2)
    assert line.startswith((f"{named}: ", f"{named} in c.yaml: "))
    assert limit in line


WIDE, FEW = ("--block-size", "256"), ("--num-gpu-blocks-override", "64")
SIZES = "must be one of 1, 2, 4, 8, 16, 32, 64, 128, 256"
FLAGS: list[tuple[tuple[str, ...], str, str, int]] = [
    (("--block-size", "0"), "--block-size", SIZES, 2),
    (("--block-size", "3"), "--block-size", SIZES, 2),
    (("--num-gpu-blocks-override", "0"), "--num-gpu-blocks-override", "from 1 to", 2),
    (("--num-gpu-blocks-override", str((1 << 24) + 1)), "--num-gpu-blocks-override", "from 1 to", 2),
    ((*WIDE, "--num-gpu-blocks-override", "16000000"), "num_gpu_blocks_override", "pages of 256KiB take 3.8 TiB", 2),
    (("--kv-cache-memory-bytes", "0B"), "--kv-cache-memory-bytes", "from 1B to 1024TiB", 2),
    (("--kv-cache-memory-bytes", "15KiB"), "kv_cache_memory_bytes", "pages of 16KiB", 2),
    ((*WIDE, "--kv-cache-memory-bytes", "3TiB"), "kv_cache_memory_bytes", "that are free; 12582912 pages", 2),
    (("--kv-cache-memory-bytes", "4"), "--kv-cache-memory-bytes", "a size with a unit", 2),
    (("--kv-cache-memory-bytes", "1GiB", *FEW), "num_gpu_blocks_override", "both size the pool: drop one", 2),
    (("--max-model-len", "1025", *FEW), "max_model_len", "at most 1024, which the pool of 64 pages holds", 2),
    (("--max-model-len", "4097"), "max_model_len", "at most the model's max_position_embeddings, 4096", 2),
    (("--max-model-len", "0"), "--max-model-len", "from 1 to 2147483647", 2),
    (("--max-num-seqs", "64", "--max-num-batched-tokens", "79"), "max_num_batched_tokens", "= 80, so that", 2),
    (("--dtype", "float16"), "--dtype", "one of auto, float32, bfloat16", 2),
    (("-tp", "3"), "tensor_parallel_size", "query heads; possible: 1, 2", 2),
    (("-tp", "4", "--page-parallel-size", "3"), "page_parallel_size", "divide tensor_parallel_size (4)", 2),
    (("-pp", "9"), "pipeline_parallel_size", "at most the model's 4 layers; possible: 1 to 4", 2),
    (("--seed", "-1"), "--seed", "from 0 to", 2),
    (("--tempratur", "1"), "--tempratur", "did you mean --temperature?", 2),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "named", "limit", "code"), FLAGS, ids=[" ".join(each[0]) for each in FLAGS])
def test_rows_56_and_57_sizes_that_cannot_be(
    processes: Processes, folder: Path, flags: tuple[str, ...], named: str, limit: str, code: int
) -> None:
    line = refused(processes, folder, *flags, code=code)
    assert line.startswith((f"{named}: got ", f"{named}: no such flag"))
    assert limit in line


def test_row_55_a_bad_variable(processes: Processes, folder: Path) -> None:
    line = refused(processes, folder, code=2, env={"QUIRE_BLOK_SIZE": "16"})
    assert line.startswith("QUIRE_BLOK_SIZE: ") and line.endswith("did you mean QUIRE_BLOCK_SIZE?")


def test_row_57_a_context_that_nobody_asked_for_is_cut_to_the_pool_and_said(processes: Processes, folder: Path) -> None:
    end = processes.run(folder.parent, [*GENERATE, "--num-gpu-blocks-override", "5"])
    assert end.code == 0
    assert "quire: max_model_len is 80 because the pool holds no more; give it more memory\n" in end.err


# model folders

Damage = Callable[[Path], object]


def edited(file: str, **changes: Any) -> Damage:
    """Fields of a JSON file changed; None takes one out."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return damage


def config(**changes: Any) -> Damage:
    return edited("config.json", **changes)


def written(file: str, content: bytes | str) -> Damage:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def only(file: str, content: bytes = b"\x80\x04N.") -> Damage:
    """The weights are in another format only."""
    return lambda folder: (folder / "model.safetensors").rename(folder / file).write_bytes(content)


def template(source: str) -> Damage:
    return edited("tokenizer_config.json", chat_template=source)


def linked(file: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(target)

    return damage


def indexed(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


BPE = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": %s}, "merges": [%s]}}'
FOLDERS: list[tuple[str, Damage, str, int]] = [
    # (what is wrong, how, the line's beginning, exit code)
    ("no config", lambda folder: (folder / "config.json").unlink(), "config.json: there is no such file", 1),
    ("config empty", written("config.json", ""), "config.json: is not valid JSON", 1),
    ("config a list", written("config.json", "[]"), "config.json: holds [], must hold one JSON object", 1),
    ("config NaN", config(rms_norm_eps=float("nan")), "config.json: holds NaN", 1),
    ("config infinite", written("config.json", '{"a": 1e999}'), "config.json: holds the number '1e999'", 1),
    ("config twice", written("config.json", '{"a": 1, "a": 2}'), "config.json: the key 'a' stands twice", 1),
    ("config deep", written("config.json", "[" * 100_000), "config.json: is nested too deeply", 1),
    ("config long", written("config.json", " " * (MIB + 1)), "config.json: has more than 1048576 bytes", 1),
    ("config bytes", written("config.json", b"\xff\xfe"), "config.json: is not UTF-8", 1),
    ("config a folder", linked("config.json", "."), "config.json: there is no such file", 1),
    ("config links to itself", linked("config.json", "config.json"), "config.json: there is no such file", 1),
    ("generation config", written("generation_config.json", "{"), "generation_config.json: is not valid JSON", 1),
    ("end beyond vocabulary", edited("generation_config.json", eos_token_id=502), "generation_config.json: eos", 1),
    ("unknown architecture", config(architectures=["OtherForCausalLM"]), "config.json: architectures: 'OtherForC", 1),
    ("two architectures", config(architectures=["LlamaForCausalLM"] * 2), "config.json: architectures: got [", 1),
    ("no architecture", config(architectures=None), "config.json: architectures is missing", 1),
    ("experts", config(num_local_experts=8), "config.json: num_local_experts: got 8", 1),
    ("quantised", config(quantization_config={"bits": 4}), "config.json: quantization_config: got {'bits': 4}", 1),
    ("code named", config(auto_map={"AutoModel": "x.Y"}), "config.json: auto_map: got", 1),
    ("code trusted", config(trust_remote_code=True), "config.json: trust_remote_code: got True", 1),
    ("code there", written("modeling.py", "raise SystemExit(7)"), "model: the folder holds code ('modeling.py')", 1),
    ("code in tokenizer", edited("tokenizer_config.json", auto_map={"A": ["x"]}), "tokenizer_config.json: auto_map", 1),
    ("no vocabulary", config(vocab_size=0), "config.json: vocab_size: got 0, must be an integer from 1", 1),
    ("text for a number", config(hidden_size="128"), "config.json: hidden_size: got '128', must be an integer", 1),
    ("float for a number", config(num_hidden_layers=4.0), "config.json: num_hidden_layers: got 4.0, must be", 1),
    ("heads not dividing", config(num_key_value_heads=3), "config.json: num_key_value_heads: got 3, must divide", 1),
    ("odd head", config(head_dim=15), "config.json: head_dim: got 15, must be even", 1),
    ("large head", config(head_dim=512), "config.json: head_dim: got 512, must be an integer from 2 to 256", 1),
    ("many layers", config(num_hidden_layers=10**6), "config.json: num_hidden_layers: got 1000000", 1),
    ("more layers than weights", config(num_hidden_layers=5), "weights: the tensor model.layers.4.", 1),
    ("fewer layers than weights", config(num_hidden_layers=3), "model.safetensors: the tensor 'model.layers.3.", 1),
    ("other shape", config(intermediate_size=353), "model.safetensors: model.layers.0.mlp.gate_proj.weight: got", 1),
    ("larger than memory", config(num_hidden_layers=4096, hidden_size=1 << 20), "kv_cache_memory_bytes: got None", 2),
    ("unknown rope", config(rope_scaling={"type": "other", "factor": 2}), "config.json: ", 1),
    ("tokenizer empty", written("tokenizer.json", ""), "tokenizer.json: ", 1),
    ("tokenizer no JSON", written("tokenizer.json", "\0" * 99), "tokenizer.json: ", 1),
    ("tokenizer deep", written("tokenizer.json", "[" * 200_000), "tokenizer.json: ", 1),
    ("tokenizer cut", lambda f: os.truncate(f / "tokenizer.json", 5000), "tokenizer.json: ", 1),
    ("negative token", written("tokenizer.json", BPE % ("-1", "")), "tokenizer.json: ", 1),
    ("merge of nothing", written("tokenizer.json", BPE % ("0", '"b c"')), "tokenizer.json: ", 1),
    ("tokenizer config", written("tokenizer_config.json", "{"), "tokenizer_config.json: ", 1),
    ("tokens no text", edited("tokenizer_config.json", bos_token=[1]), "tokenizer_config.json: bos_token", 1),
    ("template no text", edited("tokenizer_config.json", chat_template=7), "tokenizer_config.json: chat_template", 1),
    ("template open", template("{% if %}"), "chat_template: is no Jinja template", 1),
    ("template deep", template("{{ " + "not " * 5000 + "a }}"), "chat_template: is no Jinja template", 1),
    ("template of loops", template("{% for a in b %}" * 30 + "{% endfor %}" * 30), "chat_template: is no Jinja", 1),
    ("template of many ifs", template("{% if a %}" * 120 + "{% endif %}" * 120), "chat_template: is no Jinja", 1),
    ("token half a pair", edited("tokenizer_config.json", eos_token="\ud800"), "tokenizer_config.json: eos_token", 1),
    ("template filter", template("{{ a|import }}"), "chat_template: is no Jinja template", 1),
    ("template long", template("x" * (256 * 1024 + 1)), "chat_template: has 262145 characters", 1),
    # row 65
    *((f"only {name}", only(name), f"weights: the folder holds '{name}', must hold model.safetensors", 1)
      for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt", "model-q4.gguf")),
    ("a pickle by that name", written("model.safetensors", b"\x80\x04N." * 9), "model.safetensors: header of ", 1),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), "weights: the folder holds no weights", 1),
    ("dangling link", linked("model.safetensors", "/no/such/file"), "weights: the folder holds no weights", 1),
    *((f"index names {name}", indexed(name), f"model.safetensors.index.json: 'model.norm.weight': got '{name}'", 1)
      for name in ("../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "pytorch_model.bin", "")),
    ("index names nothing", indexed("gone.safetensors"), "gone.safetensors: is missing although", 1),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "begin", "code"), [each[1:] for each in FOLDERS], ids=[each[0] for each in FOLDERS])
def test_a_bad_folder_is_refused_by_file_and_field(
    processes: Processes, folder: Path, damage: Damage, begin: str, code: int
) -> None:
    damage(folder)
    assert refused(processes, folder, code=code).startswith(begin)


@pytest.mark.parametrize("name", ["absent", "p.jsonl", "a" * 300, "a/" * 3000, "../" * 50 + "proc/version", "\ud800"])
def test_what_is_no_folder_is_refused(processes: Processes, folder: Path, name: str) -> None:
    end = processes.run(folder.parent, ["generate", name, "--prompt", "a"])
    assert (end.code, end.out) == (1, "")
    assert end.line.startswith(f"model: '{name[:20]}" if name.isprintable() else "model: '\\ud800'")
    assert len(end.line) < 300


@pytest.mark.parametrize(
    ("damage", "error", "begin"),
    [
        (config(architectures=["X"]), NotSupported, "config.json: architectures: 'X'"),
        (config(vocab_size=-1), ModelError, "config.json: vocab_size: got -1"),
        (only("model.bin"), ModelError, "weights: the folder holds 'model.bin'"),
        (config(num_hidden_layers=4096, hidden_size=1 << 20), ConfigError, "kv_cache_memory_bytes: "),
    ],
)
def test_in_python_the_refusal_is_an_error_of_the_tree(
    folder: Path, damage: Damage, error: type[QuireError], begin: str
) -> None:
    damage(folder)
    with pytest.raises(error) as caught:
        LLM(str(folder))
    assert type(caught.value) is error and caught.value.code in ("FAILED_PRECONDITION", "UNIMPLEMENTED")
    assert str(caught.value).startswith(begin) and str(folder) not in str(caught.value)


def test_links_to_files_outside_the_folder_are_followed(processes: Processes, folder: Path) -> None:
    """The hub's cache is made of them; a folder is as trusted as who made it, and only named files are read."""
    plain = processes.run(folder.parent, GENERATE).out
    store = folder.parent / "store"
    store.mkdir()
    for path in list(folder.iterdir()):
        path.rename(store / path.name)
        path.symlink_to(f"../store/{path.name}")
    linked = processes.run(folder.parent, GENERATE)
    assert (linked.code, linked.out) == (0, plain), linked.err


# row 63: the file of weights


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def packed(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HUGE_SHAPE = {"a": tensor(0, 4, [1 << 62, 1 << 62, 4])}
HEADERS: list[tuple[str, bytes, str]] = [
    ("header 2^63", packed(b"{}", length=1 << 63), "header of 9223372036854775808 bytes, must be at most"),
    ("header 2^64-1", packed(b"{}", length=(1 << 64) - 1), "header of 18446744073709551615 bytes"),
    ("header beyond file", packed(b"{}", length=100), "header of 100 bytes in a file of 10"),
    ("10^5 tensors and one", packed({f"t{i}": tensor(0, 0, [0]) for i in range(100_001)}), "header of 100001 tensors"),
    ("10^5 tensors", packed({f"t{i}": tensor(0, 0, [0]) for i in range(100_000)}), ""),
    ("10^7 numbers", packed(b'{"a":[' + b"0," * 10_000_000 + b"0]}"), "header of more than 100000 tensors"),
    ("10^7 strings", packed(b'{"a":[' + b'"ab",' * 10_000_000 + b"0]}"), "header of more than 100000 tensors"),
    ("overlap", packed({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)), "'b' overlaps the tensor before"),
    ("hole", packed({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12)), "'b' leaves a hole before it"),
    ("past the end", packed({"a": tensor(0, 1 << 40, [1 << 38])}, bytes(4)), "is cut off (96 bytes, must be"),
    ("shape overflow", packed(HUGE_SHAPE, bytes(4)), "'a': data_offsets: got [0, 4], must be"),
    ("shape wraps to 0", packed({"a": tensor(0, 0, [1 << 32, 1 << 32])}), "'a': data_offsets: got [0, 0], must be"),
    ("dimension 2^63", packed({"a": tensor(0, 4, [1 << 63])}, bytes(4)), "'a': shape: got"),
    ("negative", packed({"a": tensor(0, 4, [-1])}, bytes(4)), "'a': shape: got [-1]"),
    ("no JSON", packed(b"{nonsense}"), "is not valid JSON"),
    ("no object", packed(b"[]"), "header does not start with"),
    ("deep", packed(b'{"a":' + b"[" * 100_000), "is nested too deeply"),
    ("same name twice", packed(b'{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    ("text of another width", packed(b'{"a": "' + b"x" * (16 * MIB) + '🤗"}'.encode()), "'a': got 'xxxxx"),
    ("empty", b"", "has 0 bytes, too few"),
    ("no tensors", packed(b"{}"), ""),
]  # fmt: skip


@pytest.mark.parametrize(("content", "begin"), [each[1:] for each in HEADERS], ids=[each[0] for each in HEADERS])
def test_row_63_a_hostile_header_is_refused_in_bounded_memory(
    processes: Processes, folder: Path, content: bytes, begin: str
) -> None:
    (folder / "model.safetensors").write_bytes(content)
    end = processes.run(folder.parent, GENERATE)
    assert (end.code, end.out) == (1, "")
    file = "model.safetensors: " if begin else "weights: the tensor model.embed_tokens.weight is missing"
    assert end.line.startswith(file + begin) and len(end.line) < 400
    assert end.growth < 100 * MIB + 6 * min(len(content), 16 * MIB), "memory must be bounded by what a header may hold"


def test_row_63_a_header_of_100_mb_is_not_read(processes: Processes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100 << 20) + b"{")
    os.truncate(path, 300 << 20)
    end = processes.run(folder.parent, GENERATE)
    assert end.line == "model.safetensors: header of 104857600 bytes, must be at most 67108864"
    assert (end.code, end.growth < 80 * MIB) == (1, True)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 5000, -1])
def test_row_63_a_file_that_was_cut_is_refused(processes: Processes, folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    line = refused(processes, folder, code=1)
    assert line.startswith("model.safetensors: ") and line.endswith(
        "fetch it again" if size else "file; fetch it again"
    )


# what is only seen when it runs


def answers(processes: Processes, folder: Path) -> tuple[End, list[dict[str, Any]]]:
    """A chat between two good requests."""
    talk = {"messages": [{"role": "user", "content": "What is a page?"}], "max_tokens": 2}
    lines = [{"prompt": "A page", "max_tokens": 2}, talk, {"prompt": "A page", "max_tokens": 2, "temperature": 0}]
    (folder.parent / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    end = processes.run(folder.parent, [*GENERATE, "--num-gpu-blocks-override", "64"])
    assert "Traceback" not in end.err
    return end, [json.loads(line) for line in end.out.splitlines()]


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 999999 }}{% endfor %}{% endfor %}",
            "at most 335",
        ),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.__class__ }}{{ raise_exception.__globals__ }}", "at least 1 token"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{{ messages|attr('__class__') }}", ""),
        ("{{ 'x' * 99999999999 }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{{ raise_exception('no\nchats') }}", "takes (no"),
    ],
)
def test_a_hostile_template_costs_its_own_requests_only(
    processes: Processes, folder: Path, source: str, limit: str
) -> None:
    template(source)(folder)
    end, [first, talk, last] = answers(processes, folder)
    assert end.code == 1
    assert len(first["outputs"][0]["token_ids"]) == len(last["outputs"][0]["token_ids"]) == 2
    assert (talk["error"]["code"], talk["error"]["field"]) == ("INVALID_ARGUMENT", "messages")
    assert limit in talk["error"]["message"] and "/etc" not in talk["error"]["message"]
    assert end.growth < 400 * MIB


def test_weights_that_are_no_numbers_fail_each_request_by_name(processes: Processes, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    begin, end_ = header["model.norm.weight"]["data_offsets"]
    content[start + begin : start + end_] = struct.pack("<f", float("nan")) * ((end_ - begin) // 4)
    path.write_bytes(content)
    end, lines = answers(processes, folder)
    assert end.code == 1 and "3 requests, 3 failed" in end.err
    for line in lines:
        [output] = line["outputs"]
        assert (output["finish_reason"], output["token_ids"]) == ("error", [])
        assert output["stop_reason"] == "the model's logits are not finite at this position"


@pytest.mark.parametrize("damage", [written("model.safetensors", packed(b"{}", length=1 << 63)), only("x.bin")])
def test_a_process_of_its_own_ends_within_5_s_of_cpu(folder: Path, damage: Damage) -> None:
    damage(folder)
    code = (
        "import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_CPU, (5, 5))\n"
        f"sys.argv = ['quire'] + {GENERATE!r}\nrunpy.run_module('launch.cli', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith(
        ("quire: error: model.safetensors: header", "quire: error: weights: the folder holds")
    )
