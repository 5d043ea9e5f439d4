"""safetensors: what is read equals what was saved, without a copy; everything malformed is refused by name."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagetable.errors import ModelError
from worker.weights import INDEX_FILE, MAX_HEADER_BYTES, MAX_TENSORS, SINGLE_FILE, open_weights


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write(folder: Path, header: dict[str, Any] | bytes, data: bytes = bytes(16), name: str = SINGLE_FILE) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}


def test_the_smallest_good_file_is_read(tmp_path: Path) -> None:
    weights = open_weights(write(tmp_path, {"__metadata__": {"format": "pt"}, **GOOD}, struct.pack("<4f", 1, 2, 3, 4)))
    assert weights.names == {"a", "b"}
    assert (weights.shape("b"), weights.num_bytes("b")) == ((2,), 8)
    assert weights.tensor("b", torch.float32).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_tensors_equal_those_that_were_saved(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    saved = {"x": torch.randn(5, 7).to(stored), "scalar": torch.tensor(2.5, dtype=stored), "none": torch.empty(0, 3)}
    save_file(saved, tmp_path / SINGLE_FILE)
    weights = open_weights(tmp_path)
    for name, tensor in saved.items():
        found = weights.tensor(name, wanted)
        assert found.dtype == wanted
        assert torch.equal(found, tensor.to(wanted))


def test_a_tensor_of_its_own_dtype_is_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"x": torch.zeros(64)}, path)
    weights = open_weights(tmp_path)
    mapped, copied = weights.tensor("x", torch.float32), weights.tensor("x", torch.bfloat16)
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<f", 9.0))
    assert (mapped[63].item(), copied[63].item()) == (9.0, 0.0)
    del weights
    assert mapped.sum().item() == 9.0


def test_an_unaligned_tensor_is_read_right(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": entry(1, 9)}).encode()
    header += b" " * (-len(header) % 8)
    weights = open_weights(write(tmp_path, header, b"\x07" + struct.pack("<2f", 1.5, -2.0)))
    assert weights.tensor("b", torch.float32).tolist() == [1.5, -2.0]


LONG = 1 << 63
MALFORMED: list[tuple[str, dict[str, Any] | bytes, bytes, str]] = [
    ("header no JSON", b"{nonsense}", b"", "is not valid JSON"),
    ("header a list", b"[1, 2]", b"", "does not start with '{'"),
    ("header empty", b"", b"", "does not start with '{'"),
    ("header not UTF-8", b'{"\xff": 1}', b"", "is not UTF-8"),
    ("same name twice", b'{"a": 1, "a": 2}', b"", "the key 'a' stands twice"),
    ("same field twice", b'{"a": {"dtype": "F32", "dtype": "F16"}}', b"", "the key 'dtype' stands twice"),
    ("deep nesting", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nested too deeply"),
    ("long number", b'{"a": ' + b"9" * 5000 + b"}", b"", "is not valid JSON"),
    ("NaN", b'{"a": NaN}', b"", "holds NaN"),
    ("metadata no object", {"__metadata__": [], **GOOD}, bytes(16), "__metadata__: got"),
    ("metadata no strings", {"__metadata__": {"a": 1}, **GOOD}, bytes(16), "__metadata__: got"),
    ("entry no object", {"a": 1}, b"", "'a': got 1, must have exactly dtype, shape and data_offsets"),
    ("entry lacks shape", {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), "must have exactly"),
    ("entry has more", {"a": entry(0, 4) | {"x": 1}}, bytes(4), "must have exactly"),
    ("dtype unknown", {"a": entry(0, 4, dtype="F33")}, bytes(4), "'a': dtype: got 'F33'"),
    ("dtype no string", {"a": entry(0, 4) | {"dtype": 3}}, bytes(4), "'a': dtype: got 3"),
    ("shape negative", {"a": entry(0, 4, [-1])}, bytes(4), r"'a': shape: got \[-1\]"),
    ("shape no list", {"a": entry(0, 4) | {"shape": 1}}, bytes(4), "'a': shape: got 1"),
    ("shape float", {"a": entry(0, 4, [1.0])}, bytes(4), r"'a': shape: got \[1.0\]"),
    ("shape bool", {"a": entry(0, 4, [True])}, bytes(4), r"'a': shape: got \[True\]"),
    ("shape too deep", {"a": entry(0, 4, [1] * 9)}, bytes(4), "'a': shape: .* at most 8 integers"),
    ("shape product overflow", {"a": entry(0, 4, [1 << 32, 1 << 32])}, bytes(4), "'a': data_offsets: .* bytes apart"),
    ("shape product wraps to fit", {"a": entry(0, 4, [(1 << 62) + 1])}, bytes(4), "'a': data_offsets: .* bytes apart"),
    ("dimension overflow", {"a": entry(0, 4, [1 << 63])}, bytes(4), "'a': shape: got"),
    ("shape too large", {"a": entry(0, 4, [2])}, bytes(4), r"got \[0, 4\], must be 8 bytes apart for F32 \[2\]"),
    ("offsets turned", {"a": entry(4, 0, [1])}, bytes(4), r"'a': data_offsets: got \[4, 0\]"),
    ("offsets negative", {"a": entry(-4, 0, [1])}, bytes(4), r"'a': data_offsets: got \[-4, 0\]"),
    ("offsets three", {"a": entry(0, 4) | {"data_offsets": [0, 4, 8]}}, bytes(4), "'a': data_offsets: got"),
    ("offsets beyond 2^63", {"a": entry(LONG, LONG + 4, [1])}, bytes(4), "'a': data_offsets: got"),
    ("overlap", {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' overlaps"),
    ("same place twice", {"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "'b' overlaps"),
    ("hole", {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "'b' leaves a hole before it"),
    ("hole at the start", {"a": entry(4, 8)}, bytes(8), "'a' leaves a hole before it"),
    ("cut off", GOOD, bytes(15), "is cut off"),
    ("past the end", {"a": entry(0, 1 << 40)}, bytes(4), "is cut off"),
    ("bytes behind", GOOD, bytes(17), "has bytes behind its last tensor"),
]


@pytest.mark.parametrize(("header", "data", "named"), [case[1:] for case in MALFORMED], ids=[c[0] for c in MALFORMED])
def test_a_malformed_file_is_refused_by_name(
    tmp_path: Path, header: dict[str, Any] | bytes, data: bytes, named: str
) -> None:
    write(tmp_path, header, data)
    with pytest.raises(ModelError, match=named) as caught:
        open_weights(tmp_path)
    assert str(caught.value).startswith(f"{SINGLE_FILE}: ")
    assert str(tmp_path) not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "has 0 bytes, too few"),
        (b"1234567", "has 7 bytes, too few"),
        (struct.pack("<Q", 1 << 63) + bytes(100), "header of 9223372036854775808 bytes, must be at most 67108864"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(100), "header of 67108865 bytes, must be at most 67108864"),
        (struct.pack("<Q", 100) + b"{}", "header of 100 bytes in a file of 10"),
    ],
)
def test_a_wrong_header_length_is_refused_before_it_is_read(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ModelError, match=f"{SINGLE_FILE}: {named}"):
        open_weights(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("unit", [b"[],", b"{},"])
def test_a_header_of_too_many_objects_is_refused_before_it_is_parsed(tmp_path: Path, unit: bytes) -> None:
    write(tmp_path, b'{"a":[' + unit * 2_000_000 + b"0]}", b"")
    tracemalloc.start()
    with pytest.raises(ModelError, match=f"header of more than {MAX_TENSORS} tensors"):
        open_weights(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20  # the header itself has 6 MB, parsed it has over 100


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {f"t{i}": entry(0, 0) for i in range(MAX_TENSORS + 1)}, b"")
    with pytest.raises(ModelError, match="header of 100001 tensors, must be at most 100000"):
        open_weights(tmp_path)


@pytest.mark.parametrize("dtype", ["F64", "I32", "F8_E4M3", "BOOL"])
def test_a_tensor_of_a_dtype_that_is_not_run_is_refused_by_name(tmp_path: Path, dtype: str) -> None:
    size = {"F64": 8, "I32": 4, "F8_E4M3": 1, "BOOL": 1}[dtype]
    weights = open_weights(write(tmp_path, {"a": entry(0, size, [1], dtype)}, bytes(size)))
    with pytest.raises(ModelError, match=f"a: got dtype {dtype}, must be one of F32, BF16, F16"):
        weights.tensor("a", torch.float32)


class TestCheck:
    def test_exactly_the_expected_tensors_pass(self, tmp_path: Path) -> None:
        write(tmp_path, {**GOOD, "model.layers.0.self_attn.rotary_emb.inv_freq": entry(16, 20)}, bytes(20))
        open_weights(tmp_path).check({"a": (2,)}, harmless=frozenset({"b"}))

    @pytest.mark.parametrize(
        ("expected", "named"),
        [
            (
                {"a": (2,), "b": (2,), "c": (4, 1)},
                r"weights: the tensor c is missing, must be there with shape \[4, 1\]",
            ),
            ({"a": (2,), "b": (1, 2)}, r"model.safetensors: b: got shape \[2\], must be \[1, 2\] as config.json says"),
            ({"a": (2,)}, "model.safetensors: the tensor 'b' is not known for this architecture"),
        ],
    )
    def test_others_are_named(self, tmp_path: Path, expected: dict[str, tuple[int, ...]], named: str) -> None:
        with pytest.raises(ModelError, match=named):
            open_weights(write(tmp_path, GOOD)).check(expected)


class TestShards:
    def make(self, folder: Path) -> dict[str, torch.Tensor]:
        tensors = {name: torch.randn(3, 2) for name in "abc"}
        save_file({"a": tensors["a"], "b": tensors["b"]}, folder / "one.safetensors")
        save_file({"c": tensors["c"]}, folder / "two.safetensors")
        self.index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
        return tensors

    def index(self, folder: Path, weight_map: object) -> None:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def test_all_files_are_one_set(self, tmp_path: Path) -> None:
        tensors = self.make(tmp_path)
        weights = open_weights(tmp_path)
        assert weights.names == tensors.keys()
        assert all(torch.equal(weights.tensor(name, torch.float32), tensor) for name, tensor in tensors.items())

    def test_links_into_a_store_are_followed(self, tmp_path: Path) -> None:
        """The hub's cache is made of links, with names that say nothing."""
        self.make(tmp_path)
        (tmp_path / "blobs").mkdir()
        shutil.move(tmp_path / "two.safetensors", tmp_path / "blobs" / "0123abcd")
        (tmp_path / "two.safetensors").symlink_to("blobs/0123abcd")
        assert open_weights(tmp_path).shape("c") == (3, 2)

    @pytest.mark.parametrize(
        ("weight_map", "named"),
        [
            (None, "weight_map: got None, must be an object of file names"),
            ({}, "weight_map: got {}, must be an object"),
            (["a"], "weight_map: got"),
            ({"a": 1}, "'a': got 1, must be a plain file name"),
            ({"a": "../one.safetensors"}, "'a': got '../one.safetensors', must be a plain file name"),
            ({"a": "/etc/x.safetensors"}, "must be a plain file name"),
            ({"a": "sub/one.safetensors"}, "must be a plain file name"),
            ({"a": "sub\\one.safetensors"}, "must be a plain file name"),
            ({"a": "one.safetensors\0"}, "must be a plain file name"),
            ({"a": "one.bin"}, "must be a plain file name"),
            ({"a": ".safetensors"}, "must be a plain file name"),
            ({"a": "three.safetensors"}, "three.safetensors: is missing although"),
            ({"a": "one.safetensors"}, "one.safetensors: holds 'b', which model.safetensors.index.json does not place"),
            (
                {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
                "one.safetensors: holds 'b', which model.safetensors.index.json does not place there",
            ),
            (
                {"a": "one.safetensors", "b": "one.safetensors", "d": "one.safetensors"},
                "one.safetensors: lacks 'd', which model.safetensors.index.json places there",
            ),
        ],
    )
    def test_a_wrong_index_is_refused_by_name(self, tmp_path: Path, weight_map: object, named: str) -> None:
        self.make(tmp_path)
        self.index(tmp_path, weight_map)
        with pytest.raises(ModelError, match=named):
            open_weights(tmp_path)


def save_pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt", "m.gguf", "tf_model.h5"]
)
def test_other_formats_are_refused_with_the_cure(tmp_path: Path, name: str) -> None:
    save_pickle(tmp_path / name)
    with pytest.raises(ModelError, match=f"weights: the folder holds '{name}', .*save the model as safetensors"):
        open_weights(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights: the folder holds no weights, must hold model\.safetensors or"):
        open_weights(tmp_path)


def test_a_pickle_that_is_named_safetensors_is_refused(tmp_path: Path) -> None:
    save_pickle(tmp_path / SINGLE_FILE)
    with pytest.raises(ModelError, match=r"model\.safetensors: header of [0-9]+ bytes, must be at most"):
        open_weights(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_no_damage_to_a_header_is_more_than_a_model_error(tmp_path: Path, damage: str) -> None:
    """300 random damages: each is refused, or reads as what safetensors' own reader makes of the same file."""
    path = tmp_path / SINGLE_FILE
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(5)
    changes: dict[str, Callable[[int], bytes]] = {
        "flip": lambda at: good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :],
        "cut": lambda at: good[:at],
        "grow": lambda at: good[:at] + b" " + good[at:],
    }
    header_end = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for at in torch.randint(header_end, (300,), generator=generator).tolist():
        path.write_bytes(changes[damage](at))
        try:
            weights = open_weights(tmp_path)
            found = {name: weights.tensor(name, torch.float32) for name in weights.names}
        except ModelError:
            refused += 1
            continue
        theirs = load_file(path)
        assert found.keys() == theirs.keys()
        assert all(torch.equal(found[name], theirs[name].float()) for name in found)
    assert refused > 150
