"""The weights of a model folder: safetensors, single or sharded, checked to the byte and then mapped.

A tensor in its own dtype is a view of the file's pages: no second copy is ever made, and several processes on one
machine share one. Only a change of dtype copies, tensor by tensor. A rank of several takes slices: of rows, only they
are read; of columns, what lies between passes through the page cache too (a row is shorter than what a disk reads
ahead) but is never held. Other formats (.bin, .pt, .gguf, ...) are refused; nothing is unpickled. Headers are checked
before anything is mapped, with bounded memory, because the file may come from anywhere.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from pagetable.errors import ModelError, shown
from worker.fields import parse_json, read_object
from worker.layout import Slice

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 64 << 20
MAX_INDEX_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_FILES = 10_000
MAX_RANK = 8

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHER_FORMATS = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
)
# asks the kernel to map all pages of a range now (Linux 5.14); Python 3.11 has no name for it
_MADV_POPULATE_READ = 22


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


Progress = Callable[[int, int], None]  # bytes done and bytes in all, as stored


class Weights:
    """All tensors of a model folder by name. Views stay valid as long as they live, also after this object is gone."""

    def __init__(self, files: Mapping[str, tuple[Path, TensorEntry]]) -> None:
        self._files = files
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name][1].shape

    def num_bytes(self, name: str) -> int:
        """As stored."""
        entry = self._files[name][1]
        return entry.end - entry.begin

    def check(self, expected: Mapping[str, tuple[int, ...]], harmless: frozenset[str] = frozenset()) -> None:
        """ModelError unless exactly the `expected` tensors are there in their shapes.

        Args:
            harmless: names that may be there too and are not read (a copy of a tied matrix).
        """
        for name, shape in expected.items():
            if name not in self._files:
                raise ModelError(f"weights: the tensor {name} is missing, must be there with shape {list(shape)}")
            if self.shape(name) != shape:
                raise ModelError(
                    f"{self._files[name][0].name}: {name}: got shape {list(self.shape(name))}, "
                    f"must be {list(shape)} as config.json says"
                )
        for name, (path, _) in self._files.items():
            # old checkpoints carry the rotary frequencies, which follow from config.json
            if name not in expected and name not in harmless and not name.endswith(".rotary_emb.inv_freq"):
                raise ModelError(f"{path.name}: the tensor {shown(name)} is not known for this architecture")

    def release(self) -> None:
        """Give back the memory that reading mapped. Views stay valid: what they touch is mapped again."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def tensor(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """A tensor or a slice of it in `dtype`, read-only; nothing outside its rows is read or converted.

        Args:
            rows, columns: of the first two dimensions, of step 1; None is all.

        Returns:
            A view of the mapped file where it is stored in `dtype` (with the file's stride between rows), else a copy.

        Errors: ModelError where the stored dtype is no float of 16 or 32 bits; ValueError for a slice out of range.
        """
        path, entry = self._files[name]
        stored = _DTYPES.get(entry.dtype)
        if stored is None:
            raise ModelError(f"{path.name}: {name}: got dtype {entry.dtype}, must be one of {', '.join(_DTYPES)}")
        shape = list(entry.shape)
        begin = entry.begin
        if rows is not None:
            _check_slice(name, entry.shape, 0, rows)
            begin += rows.start * math.prod(shape[1:]) * stored.itemsize
            shape[0] = len(rows)
        if columns is not None:
            _check_slice(name, entry.shape, 1, columns)
        if math.prod(shape) == 0:
            found = torch.empty(shape, dtype=dtype)
        else:
            found = self._view(self._map(path), stored, begin, math.prod(shape)).view(shape)
        return (found if columns is None else found[:, columns.start : columns.stop]).to(dtype)

    @staticmethod
    def _view(mapped: mmap.mmap, dtype: torch.dtype, begin: int, count: int) -> torch.Tensor:
        end = begin + count * dtype.itemsize
        _populate(mapped, begin, end)
        with warnings.catch_warnings():
            # torch warns that the buffer is read-only; nothing here writes to weights
            warnings.simplefilter("ignore", UserWarning)
            if begin % dtype.itemsize:
                # only a hand-made file does this; kernels need aligned elements
                return torch.frombuffer(bytearray(mapped[begin:end]), dtype=dtype)
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise ModelError(f"{path.name}: cannot be mapped ({error.strerror})") from None
        return self._maps[path]


class TensorReader:
    """A model's tensors one by one, or a rank's slices of them, in one dtype, with progress."""

    def __init__(
        self,
        weights: Weights,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        harmless: frozenset[str] = frozenset(),
        progress: Progress | None = None,
        slices: Mapping[str, Slice] | None = None,
    ) -> None:
        """Check that exactly `shapes` are there before anything is read. See `Weights.check` for errors.

        Args:
            slices: what is taken of which of them; None is all of all.
        """
        weights.check(shapes, harmless)
        self._weights, self._dtype, self._progress = weights, dtype, progress
        self._slices = dict.fromkeys(shapes, Slice()) if slices is None else slices
        self._total = sum(map(self._num_bytes, self._slices))
        self._done = 0

    def take(self, name: str) -> torch.Tensor:
        """The slice of one of the tensors, each once. See `Weights.tensor`."""
        cut = self._slices[name]
        tensor = self._weights.tensor(name, self._dtype, cut.rows, cut.columns)
        self._done += self._num_bytes(name)
        if self._progress is not None:
            self._progress(self._done, self._total)
        return tensor

    def take_if_any(self, name: str) -> torch.Tensor | None:
        """The same for a tensor that not every architecture or rank has."""
        return self.take(name) if name in self._slices else None

    def _num_bytes(self, name: str) -> int:
        """Of the slice, as stored."""
        cut, shape = self._slices[name], self._weights.shape(name)
        found = self._weights.num_bytes(name)
        for size, part in zip(shape, (cut.rows, cut.columns), strict=False):
            if part is not None:
                found = found * len(part) // max(size, 1)
        return found


def open_weights(folder: str | Path) -> Weights:
    """Check the headers of all safetensors files of a model folder; no tensor is read yet.

    Errors: ModelError names the file (without its path) and the reason.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        path = folder / SINGLE_FILE
        return Weights(MappingProxyType({name: (path, entry) for name, entry in read_header(path).items()}))
    if (folder / INDEX_FILE).is_file():
        return Weights(MappingProxyType(_read_shards(folder)))
    others = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _OTHER_FORMATS) if folder.is_dir() else []
    found = f"holds {shown(others[0])}" if others else "holds no weights"
    raise ModelError(
        f"weights: the folder {found}, must hold {SINGLE_FILE} or {INDEX_FILE}; "
        "save the model as safetensors (transformers: model.save_pretrained(folder))"
    )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. ModelError where the header and the file's size disagree in any way."""
    name = path.name
    header, file_size = _read_header_bytes(path)
    # counted before parsing: JSON can make many times its size in Python objects; a tensor of MAX_RANK has 11 commas
    if any(header.count(mark) > most * MAX_TENSORS for mark, most in ((b"{", 2), (b"[", 4), (b",", 12))):
        raise ModelError(f"{name}: header of more than {MAX_TENSORS} tensors, the most that is read")
    if not header.startswith(b"{"):
        raise ModelError(f"{name}: header does not start with '{{', this is no safetensors file")
    values = parse_json(header, name)
    assert isinstance(values, dict)
    _check_metadata(values.pop("__metadata__", {}), name)
    if len(values) > MAX_TENSORS:
        raise ModelError(f"{name}: header of {len(values)} tensors, must be at most {MAX_TENSORS}")
    data_start = 8 + len(header)
    entries = {tensor: _entry(value, name, tensor, data_start) for tensor, value in values.items()}
    _check_layout(entries, name, data_start, file_size)
    return entries


def _read_header_bytes(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the file's size; nothing is read before its length was checked."""
    name = path.name
    try:
        with path.open("rb") as file:
            file_size = file.seek(0, 2)
            file.seek(0)
            if file_size < 8:
                raise ModelError(f"{name}: has {file_size} bytes, too few for a safetensors file; fetch it again")
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > MAX_HEADER_BYTES:
                raise ModelError(f"{name}: header of {header_size} bytes, must be at most {MAX_HEADER_BYTES}")
            if header_size > file_size - 8:
                raise ModelError(f"{name}: header of {header_size} bytes in a file of {file_size}; fetch it again")
            return file.read(header_size), file_size
    except OSError as error:
        raise ModelError(f"{name}: cannot be read ({error.strerror})") from None


def _check_metadata(metadata: object, name: str) -> None:
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{name}: __metadata__: got {shown(metadata)}, must be an object of strings")


def _entry(value: object, file: str, name: str, data_start: int) -> TensorEntry:
    where = f"{file}: {shown(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where}: got {shown(value)}, must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ModelError(f"{where}: dtype: got {shown(dtype)}, must be one of {', '.join(_DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise ModelError(f"{where}: shape: got {shown(shape)}, must be at most {MAX_RANK} integers from 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where}: data_offsets: got {shown(offsets)}, must be a begin and an end from 0")
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    if size != offsets[1] - offsets[0]:
        raise ModelError(
            f"{where}: data_offsets: got {shown(offsets)}, must be {shown(size)} bytes apart for {dtype} {shown(shape)}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _naturals(value: object) -> bool:
    # 2**63 bounds each number, so that no product of eight of them grows without limit
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(entries: Mapping[str, TensorEntry], name: str, data_start: int, file_size: int) -> None:
    """The tensors must fill the file after its header: no hole, no overlap, nothing behind them."""
    position = data_start
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise ModelError(f"{name}: {shown(tensor)} {what}; fetch the file again")
        position = entry.end
    if position != file_size:
        what = "is cut off" if position > file_size else "has bytes behind its last tensor"
        raise ModelError(f"{name}: {what} ({file_size} bytes, must be {shown(position)}); fetch it again")


def _read_shards(folder: Path) -> dict[str, tuple[Path, TensorEntry]]:
    weight_map = read_object(folder / INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{INDEX_FILE}: weight_map: got {shown(weight_map)}, must be an object of file names")
    files: dict[str, None] = {}
    for tensor, file in weight_map.items():
        if not _plain_name(file):
            raise ModelError(f"{INDEX_FILE}: {shown(tensor)}: got {shown(file)}, must be a plain file name")
        files[file] = None
    if len(files) > MAX_FILES:
        raise ModelError(f"{INDEX_FILE}: names {len(files)} files, must be at most {MAX_FILES}")
    found: dict[str, tuple[Path, TensorEntry]] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ModelError(f"{file}: is missing although {INDEX_FILE} names it; fetch it again")
        for tensor, entry in read_header(path).items():
            if weight_map.get(tensor) != file:
                raise ModelError(f"{file}: holds {shown(tensor)}, which {INDEX_FILE} does not place there")
            found[tensor] = (path, entry)
        if len(found) > MAX_TENSORS:
            raise ModelError(f"{INDEX_FILE}: more than {MAX_TENSORS} tensors, the most that is read")
    if missing := weight_map.keys() - found.keys():
        tensor = min(missing)
        raise ModelError(f"{weight_map[tensor]}: lacks {shown(tensor)}, which {INDEX_FILE} places there")
    return found


def _plain_name(file: object) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and len(file) <= 255
        and not set(file) & {"/", "\\", "\0", ":"}
        and not file.startswith(".")
    )


def _check_slice(name: str, shape: tuple[int, ...], dimension: int, part: range) -> None:
    size = shape[dimension] if dimension < len(shape) else 0
    if part.step != 1 or not 0 <= part.start <= part.stop <= size:
        kind = ("rows", "columns")[dimension]
        raise ValueError(f"{name}: {kind}: got {part}, must be a run within the {size} of shape {list(shape)}")


def _populate(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Ask for pages now, so that loading shows its progress and the first step does not wait for disk."""
    begin -= begin % mmap.PAGESIZE
    try:
        mapped.madvise(_MADV_POPULATE_READ, begin, end - begin)
    except OSError:
        mapped.madvise(mmap.MADV_WILLNEED, begin, end - begin)
