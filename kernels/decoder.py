"""The native decoder step: packed weights and one call for all layers of a batch, one for the head (csrc/step.cpp).

Arrays and pointers only; what they mean is in csrc/step.h. `worker/native_model.py` fills them from a model folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kernels import cpu
from kernels.ops import Mask, PageList
from kernels.peers import Peers, Ring

PANEL = 32  # kPanel in csrc/step.h
HALF_PANEL = 16

_MADV_POPULATE_WRITE = 23
_POPULATED = 64 << 20  # bytes that are taken at a time

_ADDRESS, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
Floats = npt.NDArray[np.float32]


class _Matrix(ctypes.Structure):
    """`quire::Matrix` in csrc/step.h."""

    _fields_ = [("packed", _ADDRESS), ("bias", _ADDRESS), ("depth", _INT), ("columns", _INT)]


class _Mlp(ctypes.Structure):
    """`quire::Mlp` in csrc/step.h."""

    _fields_ = [("norm", _ADDRESS), ("gate_up", _Matrix), ("down", _Matrix)]


class _Layer(ctypes.Structure):
    """`quire::Layer` in csrc/step.h."""

    _fields_ = [
        *((name, _ADDRESS) for name in ("input_norm", "q_norm", "k_norm")),
        *((name, _Matrix) for name in ("qkv", "o")),
        ("mlp", _Mlp),
        ("window", _INT),
    ]


class _Model(ctypes.Structure):
    """`quire::Model` in csrc/step.h."""

    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("carried", _Mlp),
        *((name, ctypes.POINTER(_Mlp)) for name in ("border_in", "border_out")),
        *((name, _INT) for name in ("num_border_in", "num_border_out")),
        ("norm", _ADDRESS),
        ("head", _Matrix),
        *((name, _ADDRESS) for name in ("embedding", "frequencies")),
        *((name, _INT) for name in ("num_layers", "hidden", "q_heads", "attended_heads", "kv_heads")),
        *((name, _INT) for name in ("head_dim", "intermediate", "vocab")),
        *((name, _INT) for name in ("is_bf16", "level")),
        *((name, _DOUBLE) for name in ("eps", "rotary_factor")),
    ]


# `quire::Choice` in csrc/step.h.
CHOICE = np.dtype([*((name, np.float64) for name in ("temperature", "min_p", "top_p", "u")), ("top_k", np.int64)])
_BROKEN = 3  # kBroken in csrc/peers.h
_TEXT = (ctypes.c_char_p, _INT)
_SIGNATURES = {
    "quire_engine_new": (_ADDRESS, _INT),
    "quire_engine_free": (None, _ADDRESS),
    "quire_forward": (_INT, _ADDRESS, ctypes.POINTER(_Model), _ADDRESS, *_TEXT),
    "quire_head": (_INT, _ADDRESS, ctypes.POINTER(_Model), _ADDRESS, _INT, _ADDRESS, _INT, *(_ADDRESS,) * 4),
    "quire_choose": (_INT, _ADDRESS, _INT, _ADDRESS, *(_INT,) * 3, _ADDRESS, _ADDRESS),
    "quire_pack": (None, _ADDRESS, _INT, _INT, _INT, _ADDRESS),
}


def huge_memory(num_bytes: int) -> mmap.mmap:
    """Private memory of the machine, taken as it is first written, in huge pages where the kernel has them.

    Raises: OSError, OverflowError or ValueError where so much cannot even be reserved.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them: the same, slower
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def populate(memory: mmap.mmap) -> None:
    """Take memory of `huge_memory` from the machine now; in pieces, between which other threads run.

    Raises: OSError where the machine has no more.
    """
    for begin in range(0, len(memory), _POPULATED):
        size = min(_POPULATED, len(memory) - begin)
        try:
            memory.madvise(_MADV_POPULATE_WRITE, begin, size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            memory[begin : begin + size] = bytes(size)  # a kernel before 5.14, or not Linux


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a weight matrix in the order of the product's columns; None stands for a column of zeros.

    Attributes:
        weights: each [n, depth], of one dtype, all of one depth; elements of a row are contiguous, rows need not be.
        order: int64 [columns], numbers of rows counted through all `weights`; -1 is a column of zeros.
        biases: for each of `weights`, [n] or None.
    """

    weights: Sequence[torch.Tensor]
    order: npt.NDArray[np.int64]
    biases: Sequence[torch.Tensor | None]

    @staticmethod
    def beside(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> Rows:
        """One matrix after the other."""
        return Rows(weights, np.arange(sum(len(each) for each in weights)), biases)

    @staticmethod
    def paired(
        gate: torch.Tensor, up: torch.Tensor, gate_bias: torch.Tensor | None, up_bias: torch.Tensor | None
    ) -> Rows:
        """Panels of 16 rows of `gate` and the same 16 of `up`."""
        count = len(gate)
        padded = -(-count // HALF_PANEL) * HALF_PANEL
        of_gate = np.arange(padded)
        of_gate[count:] = -1
        of_up = np.where(of_gate < 0, -1, of_gate + count)
        order = np.stack((of_gate.reshape(-1, HALF_PANEL), of_up.reshape(-1, HALF_PANEL)), 1).reshape(-1)
        return Rows((gate, up), order, (gate_bias, up_bias))


@dataclass(frozen=True, slots=True)
class MlpRows:
    """Any units of one MLP. The norm's weights are float32 [hidden]."""

    norm: torch.Tensor
    gate_up: Rows
    down: Rows


@dataclass(frozen=True, slots=True)
class LayerRows:
    """One decoder layer. Norm weights are float32.

    Attributes:
        border: pieces of a cut MLP that the next stage has too, which a step does on either stage; of the last layer.
    """

    input_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: Rows
    o: Rows
    mlp: MlpRows
    window: int
    border: Sequence[MlpRows] = ()


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a rank's part of a model, and constants.

    Attributes:
        q_heads: the rank's own; its columns of o are theirs.
        kv_heads: of its slice, as its pages have them.
        intermediate: the rank's units of the widest MLP.
        vocab: rows of the embedding.
        windows: the different sliding windows of the layers, 0 for none.
        attended_heads: query heads of the slice, q_heads times the groups that hold its pages; 0: the own ones.
        is_cut: the next stage goes on with the last layer's MLP.
    """

    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    rotary_factor: float
    windows: tuple[int, ...]
    attended_heads: int = 0
    is_cut: bool = False

    def __post_init__(self) -> None:
        if not self.attended_heads:
            object.__setattr__(self, "attended_heads", self.q_heads)
        for name in ("q_heads", "kv_heads"):
            if self.attended_heads % getattr(self, name):
                raise ValueError(
                    f"attended_heads: got {self.attended_heads}, must be a multiple of the {getattr(self, name)} {name}"
                )

    @property
    def num_groups(self) -> int:
        return self.attended_heads // self.q_heads

    def tensor_bytes(self, tokens: int) -> int:
        """Bytes that a rank gives in an exchange of a step's `tensor` group."""
        return tokens * self.hidden * 4

    def slice_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes that a rank gives at most in an exchange of a step's `slice` group; 0 where there is none."""
        if self.num_groups == 1:
            return 0
        found = self.attended_heads * (self.head_dim + 1) * 4
        return tokens * max(found, self.q_heads * self.head_dim * dtype.itemsize)


@dataclass(slots=True)
class Border:
    """Which pieces of a cut MLP a step does where two stages have them. All are added in one order.

    Attributes:
        given: so many of the stage before are in what it handed on.
        most: so many of the next stage's are done here, at most.
        behind: to the next stage: no more are done once it waits for this step. None: it is not looked at.
        made: how many were done.
    """

    given: int = 0
    most: int = 0
    behind: Ring | None = None
    made: ctypes.c_int64 = field(default_factory=ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class Head:
    """What the head says of S rows.

    Attributes:
        tokens: int32 [S], the likeliest token of each, of equals the lowest id: its row in the head.
        values: float32 [S], its logit.
        totals: float32 [S], the sum of the row's logits: not finite where one logit is not.
        logits: float32 [S, rows of the head], or None where they were not asked for.
    """

    tokens: npt.NDArray[np.int32]
    values: Floats
    totals: Floats
    logits: torch.Tensor | None


class _Found:
    """Room for what the head says of rows, whose addresses cost more to take than the numbers to copy."""

    def __init__(self, rows: int) -> None:
        self.tokens, self.values, self.totals = (
            np.empty(rows, np.int32),
            np.empty(rows, np.float32),
            np.empty(rows, np.float32),
        )
        self.addresses = tuple(each.ctypes.data for each in (self.tokens, self.values, self.totals))


class NativeDecoder:
    """Packed weights, a team of threads and the working memory of steps. One caller at a time.

    Attributes:
        shape, deterministic: as given.
        model, engine: what native code gets.
    """

    def __init__(
        self,
        shape: DecoderShape,
        dtype: torch.dtype,
        embedding: torch.Tensor | None,
        norm: torch.Tensor | None,
        frequencies: torch.Tensor,
        backend: cpu.Native,
        threads: int,
        *,
        deterministic: bool = False,
    ) -> None:
        """Begin a decoder; layers and head follow by `add_layers` and `set_head`.

        Args:
            dtype: float32 or bfloat16, of weights and pages.
            embedding: [vocab, hidden] of `dtype`, contiguous; read where it lies. None behind the first stage.
            norm: float32 [hidden], of the last norm. None before the last stage, which alone has a head.
            frequencies: float64 [head_dim / 2].
            threads: that work on a step, the caller's included; as many on all ranks of a `tensor` group.
            deterministic: sum every row in one order, whatever the batch, the chunk and the number of threads.
        """
        library = cpu.library(_SIGNATURES)
        self._library, self.shape, self._dtype, self._threads = library, shape, dtype, threads
        self.deterministic = deterministic
        self._keep: list[object] = []
        self._layers: list[_Layer] = []
        self._message = ctypes.create_string_buffer(cpu.MESSAGE_BYTES)
        self._found = _Found(0)
        self.model = _Model(
            norm=self._pointer(norm),
            embedding=self._pointer(embedding),
            frequencies=self._pointer(frequencies),
            hidden=shape.hidden,
            q_heads=shape.q_heads,
            attended_heads=shape.attended_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            vocab=shape.vocab,
            is_bf16=int(dtype == torch.bfloat16),
            level=backend.level,
            eps=shape.eps,
            rotary_factor=shape.rotary_factor,
        )
        self.engine = library.quire_engine_new(threads)
        if not self.engine:
            raise MemoryError(f"no {threads} threads for the decoder")

    def __del__(self) -> None:
        if getattr(self, "engine", None):
            self._library.quire_engine_free(self.engine)
            self.engine = None

    def set_carried(self, mlp: MlpRows, border: Sequence[MlpRows] = ()) -> None:
        """Pack the units that the stage before left of its last layer's MLP; they come before the first layer.

        Args:
            border: pieces of that MLP that the stage before has too, see `LayerRows`.
        """
        mlps = (*border, mlp)
        *pieces, self.model.carried = self._mlps(mlps, self._pack(_matrices(mlps)))
        self.model.border_in, self.model.num_border_in = (_Mlp * len(pieces))(*pieces), len(pieces)

    def add_layer(self, layer: LayerRows) -> None:
        """Pack a layer; its plain weights are not needed afterwards."""
        norms = (self._pointer(each) for each in (layer.input_norm, layer.q_norm, layer.k_norm))
        mlps = (layer.mlp, *layer.border)
        qkv, o, *matrices = self._pack([layer.qkv, layer.o, *_matrices(mlps)])
        mlp, *pieces = self._mlps(mlps, matrices)
        self._layers.append(_Layer(*norms, qkv, o, mlp, self.shape.windows.index(layer.window)))
        self.model.border_out, self.model.num_border_out = (_Mlp * len(pieces))(*pieces), len(pieces)
        layers = (_Layer * len(self._layers))(*self._layers)
        self.model.layers, self.model.num_layers = layers, len(layers)

    def set_head(self, head: Rows) -> None:
        """Pack the head: the vocabulary, or a rank's rows of it."""
        (self.model.head,) = self._pack((head,))

    def first_weights(self, most: int) -> tuple[int, int]:
        """Where the weights lie that every step reads first, behind pieces of a border that are left to it, and for how
        many bytes, `most` at most, thread 0 goes on."""
        layer, carried = self._layers[0], self.model.carried
        matrices = [carried.gate_up, carried.down] if carried.norm else [layer.qkv, layer.o, layer.mlp.gate_up]
        sizes = [-(-each.columns // PANEL) * PANEL * each.depth * 4 for each in matrices]  # one behind the other
        return matrices[0].packed, min(most, sum(sizes) if self._threads == 1 else sizes[0] // self._threads)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        query_start: torch.Tensor,
        pool: torch.Tensor,
        pages: Mapping[int, PageList],
        masks: Mapping[int, Mask],
        *,
        hidden: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        tensor: Peers | None = None,
        slice: Peers | None = None,
        border: Border | None = None,
    ) -> torch.Tensor:
        """Run all layers over one ragged batch of T tokens in R rows.

        Args:
            tokens, positions, slots: int64 [T]; a slot of -1 is in another group's page, and not written.
            query_start: int32 [R+1].
            pool: as in `kernels.ops`; this step's K and V are written, in every layer before any row attends.
            pages, masks: by window, all of the shape's windows; all pages lie in `pool`, of a split slice the own
                group's only.
            hidden: what the stage before returned, contiguous; it may be changed, and `tokens` are not read.
            out: where there is no `hidden`: what is to be returned, contiguous and of any values.
            tensor: the ranks among which heads, MLP units and so all sums are split; None: all is here. All of a group
                give the same rows of the same tokens, and get the same bits.
            slice: the ranks that hold the pages of these kv heads, shape.num_groups of them in the order of their
                heads; None: all pages are here.
            border: what of the pieces that two stages have is done where; None: by the later one.

        Returns:
            float32 [T, hidden], the residual stream behind the last layer. Where that layer's MLP is cut, [2, T,
            hidden]: the stream before the MLP, and what the units so far add to it.

        Raises:
            ValueError: an id that may not be, more tokens than a group's regions hold, or more pieces given than there
                are; MemoryError. Nothing was written or exchanged then.
            PeersBroken: an exchange failed; this step's K and V may be there or not.
        """
        shape, num_tokens = self.shape, len(tokens)
        is_carried, is_cut = self.model.carried.norm is not None, shape.is_cut
        if hidden is None:
            if self.model.embedding is None:
                raise ValueError("hidden: got none, must be given where there is no embedding (a later stage)")
            if out is None:
                out = torch.empty(self._rows(num_tokens, is_cut), dtype=torch.float32)
            else:
                _check_hidden("out", out, self._rows(num_tokens, is_cut))
            partial_in, ids = 0, tokens.data_ptr()
        else:
            _check_hidden("hidden", hidden, self._rows(num_tokens, is_carried))
            out, partial_in, ids = hidden, 0, 0
            if is_carried:
                out, partial_in = hidden[0], hidden[1].data_ptr()
            if is_cut:
                out = torch.stack((out, out))  # room for what the last MLP adds
        border = border or Border()
        if (1 if slice is None else slice.size) != shape.num_groups:
            got = "none" if slice is None else f"{slice.size} ranks"
            raise ValueError(f"slice: got {got}, must be the {shape.num_groups} groups of the shape")
        windows = shape.windows
        lists = [pages[window] for window in windows]
        count, item = len(lists), 8
        by_window = array("q", [each.start.data_ptr() for each in lists])
        by_window.extend([each.block.data_ptr() for each in lists])
        by_window.extend([each.position.data_ptr() for each in lists])
        by_window.extend(windows)
        by_window.extend([len(each.block) for each in lists])
        where = by_window.buffer_info()[0]
        size = pool.element_size()
        step = array(  # `quire::Step` in csrc/step.h, whose members are as wide as these
            "q",
            (
                *(ids, positions.data_ptr(), slots.data_ptr(), query_start.data_ptr()),
                masks[windows[0]].first_position.data_ptr(),
                *(where, where + count * item, where + 2 * count * item),  # page_start, page_block, page_position
                *(where + 3 * count * item, where + 4 * count * item),  # windows, num_entries
                *(pool.data_ptr(), out.data_ptr(), partial_in, out[1].data_ptr() if is_cut else 0),
                *(border.given, min(border.most, self.model.num_border_out)),
                *(
                    0 if border.behind is None else ctypes.addressof(border.behind.struct),
                    ctypes.addressof(border.made),
                ),
                *(pool.stride(0) * size, pool.stride(1) * size, pool.shape[1], pool.shape[4]),
                *(num_tokens, len(query_start) - 1, count),
                *(self.deterministic, pool.dtype == torch.int8),
                *(_address_of(tensor), _address_of(slice)),
            ),
        )
        message = self._message
        code = self._library.quire_forward(self.engine, self.model, step.buffer_info()[0], message, cpu.MESSAGE_BYTES)
        if code == _BROKEN:
            raise next(each.broken() for each in (tensor, slice) if each is not None and each.is_broken)
        cpu.raise_for(code, message)
        return out

    def head(self, hidden: torch.Tensor, rows: npt.NDArray[np.int64], *, logits: bool) -> Head:
        """Norm and head over some rows of what `forward` returned; all their logits too where asked for.

        Raises: ValueError: a row that is not there, or a stage that has no head; MemoryError.
        """
        if self.model.norm is None or not self.model.head.packed:
            raise ValueError("head: this decoder has no norm and head; the last stage has them")
        count = len(rows)
        if count > len(self._found.tokens):
            self._found = _Found(count)
        found = self._found
        out = torch.empty((count, self.model.head.columns), dtype=torch.float32) if logits else None
        where = (hidden.data_ptr(), len(hidden), rows.ctypes.data, count, None if out is None else out.data_ptr())
        code = self._library.quire_head(self.engine, self.model, *where, *found.addresses)
        if code == 1:
            raise ValueError(f"rows: got {rows.min()} to {rows.max()}, must be from 0 to {len(hidden) - 1}")
        if code:
            raise MemoryError("head: no memory for the rows")
        return Head(found.tokens[:count].copy(), found.values[:count].copy(), found.totals[:count].copy(), out)

    def choose(self, rows: torch.Tensor, choices: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
        """`choose` on this decoder's threads."""
        return _choose(self._library, self.engine, self.model.level, rows, choices)

    def _rows(self, tokens: int, is_cut: bool) -> tuple[int, ...]:
        """The shape of what one stage hands to the next."""
        rows = (tokens, self.shape.hidden)
        return (2, *rows) if is_cut else rows

    def _mlps(self, mlps: Sequence[MlpRows], matrices: Sequence[_Matrix]) -> list[_Mlp]:
        pairs = zip(matrices[::2], matrices[1::2], strict=True)
        return [_Mlp(self._pointer(mlp.norm), *pair) for mlp, pair in zip(mlps, pairs, strict=True)]

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _pack(self, matrices: Sequence[Rows]) -> list[_Matrix]:
        """Packed copies in one piece of memory; several threads copy."""
        is_bf16 = int(self._dtype == torch.bfloat16)
        element = self._dtype.itemsize
        jobs, offsets, size = [], [], 0
        for rows in matrices:
            panels = -(-len(rows.order) // PANEL)
            columns = rows.weights[0].shape[1]
            assert all(
                each.shape[1] == columns and each.dtype == self._dtype and (columns == 1 or each.stride(1) == 1)
                for each in rows.weights
            )
            words = -(-columns // 2) if is_bf16 else columns
            offsets.append((size, words))
            table = np.zeros(panels * PANEL, np.uint64)
            starts = np.concatenate(
                [
                    each.data_ptr() + np.arange(len(each), dtype=np.uint64) * (each.stride(0) * element)
                    for each in rows.weights
                ]
            )
            there = rows.order >= 0
            table[: len(there)][there] = starts[rows.order[there]]
            step = max(1, -(-panels // self._threads))
            for panel in range(0, panels, step):
                count = min(step, panels - panel)
                jobs.append((table, panel, count, columns, size + panel * words * PANEL * 4))
            size += panels * words * PANEL * 4
        memory = huge_memory(size)
        self._keep.append(memory)
        base = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()

        def copy(job: tuple[npt.NDArray[np.uint64], int, int, int, int]) -> None:
            table, panel, count, columns, offset = job
            self._library.quire_pack(table.ctypes.data + panel * PANEL * 8, count, columns, is_bf16, base + offset)

        with ThreadPoolExecutor(self._threads) as threads:
            list(threads.map(copy, jobs))
        return [
            _Matrix(base + offset, self._pointer(_bias(rows)), words, len(rows.order))
            for rows, (offset, words) in zip(matrices, offsets, strict=True)
        ]


def choose(rows: torch.Tensor, choices: npt.NDArray[np.void], backend: cpu.Native) -> npt.NDArray[np.int64]:
    """A token for each row of logits, on the calling thread; `worker.draw.choose` says what is drawn.

    Args:
        rows: float32 [R, V] with contiguous rows, each with a finite largest logit.
        choices: [R] of CHOICE.
    """
    return _choose(cpu.library(_SIGNATURES), None, backend.level, rows, choices)


def _choose(
    library: ctypes.CDLL, engine: int | None, level: int, rows: torch.Tensor, choices: npt.NDArray[np.void]
) -> npt.NDArray[np.int64]:
    assert rows.dtype == torch.float32 and rows.stride(1) == 1
    assert choices.dtype == CHOICE and choices.flags.c_contiguous and len(choices) == len(rows)
    tokens = np.empty(len(rows), np.int64)
    what = (rows.data_ptr(), rows.stride(0), len(rows), rows.shape[1])
    if library.quire_choose(engine, level, *what, choices.ctypes.data, tokens.ctypes.data):
        raise MemoryError("choose: no memory for candidates")
    return tokens


def _address_of(peers: Peers | None) -> int:
    """For a step: 0 where there is nobody else."""
    return 0 if peers is None or peers.size == 1 else ctypes.addressof(peers.struct)


def _matrices(mlps: Sequence[MlpRows]) -> list[Rows]:
    return [each for mlp in mlps for each in (mlp.gate_up, mlp.down)]


def _check_hidden(name: str, hidden: torch.Tensor, shape: tuple[int, ...]) -> None:
    if hidden.shape != shape or hidden.dtype != torch.float32 or not hidden.is_contiguous():
        raise ValueError(
            f"{name}: got {hidden.dtype} {tuple(hidden.shape)} of strides {hidden.stride()}, must be float32 "
            f"{shape}, contiguous"
        )


def _bias(rows: Rows) -> torch.Tensor | None:
    """float32 by column, padded to whole panels."""
    if all(bias is None for bias in rows.biases):
        return None
    parts = [
        torch.zeros(len(weight)) if bias is None else bias.to(torch.float32)
        for weight, bias in zip(rows.weights, rows.biases, strict=True)
    ]
    found = torch.zeros(-(-len(rows.order) // PANEL) * PANEL)
    there = torch.from_numpy(rows.order >= 0)
    found[: len(there)][there] = torch.cat(parts)[torch.from_numpy(rows.order[rows.order >= 0])]
    return found
