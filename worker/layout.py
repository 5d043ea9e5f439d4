"""How a shard's ranks divide a model: tensor ranks by heads and rows, stages by layers, groups by pages.

A stage may end inside the MLP of its last layer, whose rows add up: the next stage does the others, before its own
layers. The attention of a layer, and with it its pages, lies in one stage. Where a stage is one rank, some rows of that
MLP are on both: a decode reads all of the head, a chunk of a prompt next to none, which moves the middle.

Rank = stage * T + t, and t = slice * G + group. Query heads are dealt slice-major, so the G ranks of a slice together
own the query heads of its key-value heads and hold equal copies of its K and V weights; pages lie in one group each:

    T = 4, G = 2, 8 query heads, 2 key-value heads        group 0      group 1
                                             slice 0   t=0: q 0,1   t=1: q 2,3    kv 0 on both
                                             slice 1   t=2: q 4,5   t=3: q 6,7    kv 1 on both

Arithmetic of shapes only: standard library, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pagetable.errors import ConfigError
from worker.model_config import ModelConfig
from worker.split import split_evenly

MAX_SIZE = 4096  # of each way: no model has more heads or layers
MLP_UNIT = 16  # kHalfPanel in csrc/step.h: rows of gate and up, columns of down
PANEL = 32  # kPanel in csrc/step.h: rows of a packed matrix
_MLP_PIECES = 16  # of a layer's MLP, at most: between them a stage may end
_GAIN = 0.01  # of the largest stage's cost: what ends inside MLPs must win, since they double what is handed on
_SLACK = 3  # pieces of an MLP by which one of two stages may be late before the other waits
_WORD_BYTES = 4  # of packed weights: a float, or two bfloat16
_MLP, _MLP_NORM = ("gate_proj", "up_proj", "down_proj"), "post_attention_layernorm"
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Slice:
    """A rank's part of a tensor as stored: consecutive rows, consecutive columns; None is all of them."""

    rows: range | None = None
    columns: range | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """What of the layers a stage computes.

    Attributes:
        layers: those whose attention and pages it has.
        last_mlp: rows of its last layer's MLP: from the first, all of them or as many as it always does.
        carried_mlp: rows of the MLP of the layer before `layers`: those that the stage before never does, if any.
        border_in, border_out: pieces between the two, of the MLP of the layer before and of the last layer's, that both
            stages have.
        border_even: so many of `border_out` make stages even for a decode.
    """

    layers: range
    last_mlp: range
    carried_mlp: range
    border_in: tuple[range, ...] = ()
    border_out: tuple[range, ...] = ()
    border_even: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks a shard has, and in which order.

    Attributes:
        tensor: ranks that share each layer's heads and rows (T).
        pipeline: stages of consecutive layers (P).
        page: groups over which pages are spread (G); divides `tensor`.
    """

    tensor: int = 1
    pipeline: int = 1
    page: int = 1

    def __post_init__(self) -> None:
        for field in ("tensor", "pipeline", "page"):
            if not 1 <= getattr(self, field) <= MAX_SIZE:
                raise ConfigError(f"{field}_parallel_size", getattr(self, field), f"be from 1 to {MAX_SIZE}")
        if self.tensor % self.page:
            raise ConfigError(
                "page_parallel_size",
                self.page,
                f"divide tensor_parallel_size ({self.tensor})",
                f"possible: {_listed(_divisors(self.tensor))}",
            )

    @property
    def num_ranks(self) -> int:
        return self.pipeline * self.tensor

    @property
    def num_slices(self) -> int:
        """Of key-value heads: the T / G ranks of a group hold one each."""
        return self.tensor // self.page

    def is_possible(self, model: ModelConfig) -> bool:
        """Whether `check` would pass."""
        return self._fault(model) is None

    def check(self, model: ModelConfig) -> None:
        """ConfigError where the model can't be divided so; it names the flag, the reason and the possible values."""
        fault = self._fault(model)
        if fault is None:
            return
        field, limit = fault
        if field == "pipeline_parallel_size":
            raise ConfigError(field, self.pipeline, limit, f"possible: 1 to {model.num_layers}")
        raise ConfigError(field, self.tensor, limit, self._tensor_cure(model))

    def part(self, model: ModelConfig, rank: int) -> Part:
        """What one rank holds. ConfigError as `check`; ValueError where there is no such rank."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank: got {rank}, must be from 0 to {self.num_ranks - 1}")
        return self.parts(model)[rank]

    def parts(self, model: ModelConfig) -> tuple[Part, ...]:
        """What every rank holds, by rank. ConfigError as `check`."""
        stages = self.stages(model)
        vocab_unit = PANEL if model.vocab_size >= PANEL * self.tensor else 1  # whole panels where there are enough
        return tuple(
            Part(
                layout=self,
                rank=number * self.tensor + t,
                layers=stage.layers,
                heads=_share(range(model.num_heads), self.tensor, t),
                attended=_share(range(model.num_heads), self.num_slices, t // self.page),
                kv_heads=self._kv_heads(model.num_kv_heads, t // self.page),
                mlp=_share(range(model.intermediate_size), self.tensor, t, MLP_UNIT),
                last_mlp=_share(stage.last_mlp, self.tensor, t, MLP_UNIT),
                carried_mlp=_share(stage.carried_mlp, self.tensor, t, MLP_UNIT),
                border_in=stage.border_in,
                border_out=stage.border_out,
                border_even=stage.border_even,
                vocab=_share(range(model.vocab_size), self.tensor, t, vocab_unit),
            )
            for number, stage in enumerate(stages)
            for t in range(self.tensor)
        )

    def stages(self, model: ModelConfig) -> tuple[Stage, ...]:
        """The parts of the layers: the split by weights whose largest stage has the fewest.

        Four fifths of the head's count with the last layer: a decode reads all of them, a chunk of a prompt next to
        none. The embedding's do not: a step looks up a few rows. Stages end between layers, or inside MLPs where
        that makes the largest one smaller by `_GAIN`. Where stages are one rank, two of them have some of such an MLP,
        and with it what chunks of prompts and decodes differ in, and by what one may be late: from where the first
        would end if the head did not count to a little behind where it ends.
        """
        self.check(model)
        edges = self._mlp_edges(model.intermediate_size)
        pieces = _piece_costs(model, edges, model.vocab_size * model.hidden_size * 4 // 5)
        count = len(edges)  # pieces of a layer
        layers = [sum(pieces[at : at + count]) for at in range(0, len(pieces), count)]
        whole = tuple(range(run.start * count, run.stop * count) for run in split_evenly(layers, self.pipeline))
        cut = split_evenly(pieces, self.pipeline)

        def largest(runs: Sequence[range]) -> int:
            return max(sum(pieces[run.start : run.stop]) for run in runs)

        def border(stop: int, low: int) -> tuple[int, ...]:
            """Where pieces of the border begin, and the last one ends, in the MLP inside of which a stage ends."""
            layer, rest = divmod(stop, count)
            if not rest or self.tensor > 1:
                return (rest,)
            first, last = max(min(low - layer * count, rest - _SLACK), 1), min(rest + _SLACK, count - 1)
            return (first, *range(max(first + 1, rest - _SLACK), last + 1))

        def stages(runs: Sequence[range], lows: Sequence[range]) -> tuple[Stage, ...]:
            size, found = model.intermediate_size, list[Stage]()
            before: tuple[int, ...] = (0,)
            for run, low in zip(runs, lows, strict=True):
                after = border(run.stop, low.stop)
                found.append(
                    Stage(
                        layers=range(-(-run.start // count), -(-run.stop // count)),
                        last_mlp=range(edges[after[0]] or size),
                        carried_mlp=range(edges[before[-1]] or size, size),
                        border_in=_runs(edges[at] for at in before),
                        border_out=_runs(edges[at] for at in after),
                        border_even=sum(at <= run.stop % count for at in after[1:]),
                    )
                )
                before = after
            return tuple(found)

        if largest(cut) <= (1 - _GAIN) * largest(whole):
            found = stages(cut, split_evenly(_piece_costs(model, edges, 0), self.pipeline))
            if all(each.layers for each in found):
                return found
        return stages(whole, whole)

    def _mlp_edges(self, rows: int) -> range:
        """Where the pieces of an MLP begin: each tensor rank gets units before and behind each but the first."""
        unit = MLP_UNIT * self.tensor
        piece = unit * -(-rows // (unit * _MLP_PIECES))
        return range(0, max(rows - MLP_UNIT * (self.tensor - 1), 1), piece)

    def device_id(self, stage: int, group: int, first: int = 0) -> int:
        """Of the pool that the ranks of one stage and group hold together; a shard's device ids begin at `first`."""
        return first + stage * self.page + group

    def _kv_heads(self, num_kv_heads: int, part: int) -> range:
        if num_kv_heads % self.num_slices == 0:
            return _share(range(num_kv_heads), self.num_slices, part)
        head = part * num_kv_heads // self.num_slices  # fewer heads than slices: several hold the same one
        return range(head, head + 1)

    def _fault(self, model: ModelConfig) -> tuple[str, str] | None:
        """The flag at fault and the end of "must ..."; None where all is well."""
        heads, kv_heads, slices = model.num_heads, model.num_kv_heads, self.num_slices
        units = -(-model.intermediate_size // MLP_UNIT)
        if heads % self.tensor:
            return "tensor_parallel_size", f"divide the model's {heads} query heads"
        if kv_heads % slices and slices % kv_heads:
            return "tensor_parallel_size", (
                f"make slices (tensor_parallel_size / page_parallel_size = {slices}) "
                f"that divide the model's {kv_heads} key-value heads or are a multiple of them"
            )
        if self.tensor > units:
            return "tensor_parallel_size", (
                f"be at most {units}: the {model.intermediate_size} rows of the MLP are dealt in units of {MLP_UNIT}"
            )
        if self.tensor > model.vocab_size:
            return "tensor_parallel_size", f"be at most the vocabulary's {model.vocab_size} rows"
        if self.pipeline > model.num_layers:
            return "pipeline_parallel_size", f"be at most the model's {model.num_layers} layers"
        return None

    def _tensor_cure(self, model: ModelConfig) -> str:
        """What `tensor` may be with this `page`, and `page` with this `tensor`."""

        def sizes(page: int) -> list[int]:
            found = [size for size in _divisors(model.num_heads) if size % page == 0]
            return [size for size in found if Layout(size, 1, page).is_possible(model)]

        def with_page(page: int) -> str:
            return f"{_listed(sizes(page))} with page_parallel_size {page}"

        pages = [page for page in _divisors(self.tensor) if Layout(self.tensor, 1, page).is_possible(model)]
        cures = [with_page(self.page)] if sizes(self.page) else []
        if pages:
            cures.append(f"page_parallel_size {_listed(pages)} with tensor_parallel_size {self.tensor}")
        return f"possible: {'; or '.join(cures or [with_page(1)])}"


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's share of a model.

    Attributes:
        layers: those of its stage, numbered in the whole model.
        heads: query heads whose projections it owns.
        attended: query heads of its slice: those of `slice_peers` in their order.
        kv_heads: of its slice; every rank of `slice_peers` has the same.
        mlp: rows of gate and up, columns of down, of a layer whose MLP is in one stage.
        last_mlp: the same of its last layer's MLP: fewer than `mlp` where its stage ends inside that one.
        carried_mlp: the same of the MLP that the stage before left unfinished; empty where it left none.
        border_in, border_out, border_even: of its stage, which is one rank where there is a border.
        vocab: rows of the head; of use on the last stage.
    """

    layout: Layout
    rank: int
    layers: range
    heads: range
    attended: range
    kv_heads: range
    mlp: range
    last_mlp: range
    carried_mlp: range
    border_in: tuple[range, ...]
    border_out: tuple[range, ...]
    border_even: int
    vocab: range

    @property
    def stage(self) -> int:
        return self.rank // self.layout.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.layout.tensor

    @property
    def slice(self) -> int:
        return self.tensor_rank // self.layout.page

    @property
    def group(self) -> int:
        return self.tensor_rank % self.layout.page

    @property
    def is_first(self) -> bool:
        """Whether its stage has the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether its stage has the last norm and the head."""
        return self.stage == self.layout.pipeline - 1

    @property
    def is_cut(self) -> bool:
        """Whether the next stage goes on with its last layer's MLP: a rank then has one unit less, or several."""
        return self.last_mlp != self.mlp

    @property
    def is_carrying(self) -> bool:
        """Whether it goes on with the MLP of the layer before its first."""
        return len(self.carried_mlp) > 0

    @property
    def tensor_peers(self) -> range:
        """The ranks of its stage, which add up partial sums."""
        first = self.stage * self.layout.tensor
        return range(first, first + self.layout.tensor)

    @property
    def slice_peers(self) -> range:
        """The ranks of its slice, by group, which exchange queries and merge partial attention."""
        first = self.rank - self.group
        return range(first, first + self.layout.page)

    def device_id(self, first: int = 0) -> int:
        """Of the pool of its stage and group. See `Layout.device_id`."""
        return self.layout.device_id(self.stage, self.group, first)

    def tensors(self, model: ModelConfig) -> dict[str, Slice]:
        """Every tensor that the rank reads, in the order of the computation, and what of it.

        The biases of o and down are read by tensor rank 0 alone, which adds them to its part of the sum; that of a cut
        MLP's down in the first of its two stages.
        """
        found = {}
        for name in model.tensor_shapes():
            layer = _layer_of(name)
            cut = self._cut(name, model) if layer is None else self._layer_cut(name, model.head_dim, layer)
            if cut is not None:
                found[name] = cut
        return found

    def weight_bytes(self, model: ModelConfig, item_bytes: int) -> int:
        """Memory that its weights take once loaded: packed matrices with their padding, norms, the embedding.

        Args:
            item_bytes: 2 or 4, of the dtype that it runs in.
        """

        def matrix(columns: int, depth: int, bias: bool = False) -> int:
            padded = -(-columns // PANEL) * PANEL
            return padded * _WORD_BYTES * (-(-depth * item_bytes // _WORD_BYTES) + bias)

        hidden, own_q = model.hidden_size, len(self.heads) * model.head_dim
        qkv = own_q + 2 * len(self.kv_heads) * model.head_dim
        adds_biases = self.tensor_rank == 0
        attention = (
            matrix(qkv, hidden, model.qkv_bias)
            + matrix(hidden, own_q, model.o_bias and adds_biases)
            + (hidden + 2 * model.head_dim * model.qk_norm) * 4
        )

        def mlp(rows: range, adds_bias: bool = adds_biases) -> int:
            if not rows:
                return 0
            gate_up = matrix(2 * -(-len(rows) // MLP_UNIT) * MLP_UNIT, hidden, model.mlp_bias)
            return gate_up + matrix(hidden, len(rows), model.mlp_bias and adds_bias) + hidden * 4

        mlps = (len(self.layers) - 1) * mlp(self.mlp) + mlp(self.last_mlp)
        mlps += sum(mlp(rows, adds_bias=False) for rows in (self.carried_mlp, *self.border_in, *self.border_out))
        embedding = model.vocab_size * hidden * item_bytes if self.is_first else 0
        head = matrix(len(self.vocab), hidden) + hidden * 4 if self.is_last else 0
        return len(self.layers) * attention + mlps + embedding + head

    def block_bytes(self, block_size: int, row_bytes: int) -> int:
        """Of one block of its pool: K and V of its layers and key-value heads.

        Args:
            row_bytes: of one token's K (or V) of one head.
        """
        return 2 * len(self.layers) * len(self.kv_heads) * block_size * row_bytes

    def device_block_bytes(self, block_size: int, row_bytes: int) -> int:
        """Of one block over the ranks that hold its page together, heads that several hold counted each time."""
        return self.layout.num_slices * self.block_bytes(block_size, row_bytes)

    def _cut(self, name: str, model: ModelConfig) -> Slice | None:
        """What it reads of a tensor outside the layers; None for nothing."""
        if name == _EMBEDDING and self.is_first:
            return Slice()
        if name == _NORM and self.is_last:
            return Slice()
        is_head = name == (_EMBEDDING if model.tie_word_embeddings else _HEAD)
        return Slice(self.vocab) if is_head and self.is_last else None

    def _layer_cut(self, name: str, head_dim: int, layer: int) -> Slice | None:
        """The same for a layer's tensor."""
        linear, kind = name.split(".")[-2:]
        is_carried = self.is_carrying and layer == self.layers.start - 1
        if layer not in self.layers and not (is_carried and linear in (*_MLP, _MLP_NORM)):
            return None
        q, kv = (range(heads.start * head_dim, heads.stop * head_dim) for heads in (self.heads, self.kv_heads))
        mlp = self.mlp
        if is_carried:
            mlp = range((*self.border_in, self.carried_mlp)[0].start, self.carried_mlp.stop)
        elif layer == self.layers[-1]:
            mlp = range(self.last_mlp.start, (self.last_mlp, *self.border_out)[-1].stop)
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": mlp, "up_proj": mlp}
        columns = {"o_proj": q, "down_proj": mlp}
        if linear not in columns:
            return Slice(rows.get(linear))  # norms are whole
        if kind == "weight":
            return Slice(None, columns[linear])
        return Slice() if self.tensor_rank == 0 and not is_carried else None


def _piece_costs(model: ModelConfig, edges: range, head: int) -> list[int]:
    """Weights of the layers' pieces, which begin at these rows of each MLP; all else of a layer is in its first, and
    the `head` counts with the last one."""
    size = model.intermediate_size
    widths = [end - begin for begin, end in pairwise((*edges, size))]
    costs = [0] * (model.num_layers * len(widths))
    for name, shape in model.tensor_shapes().items():
        if (layer := _layer_of(name)) is None:
            continue
        first, cost = layer * len(widths), math.prod(shape)
        linear, kind = name.split(".")[-2:]
        if linear in _MLP and (linear, kind) != ("down_proj", "bias"):
            for piece, width in enumerate(widths):
                costs[first + piece] += cost // size * width
        else:
            costs[first] += cost
    costs[-1] += head
    return costs


def _runs(places: Iterable[int]) -> tuple[range, ...]:
    """From each place to the next one."""
    return tuple(range(begin, end) for begin, end in pairwise(places))


def _share(total: range, parts: int, part: int, unit: int = 1) -> range:
    """One of `parts` runs of `total`, cut at multiples of `unit` from its start; they differ by one unit at most."""
    units = -(-len(total) // unit)
    begin, end = (min(len(total), units * edge // parts * unit) for edge in (part, part + 1))
    return range(total.start + begin, total.start + end)


def _layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to."""
    words = name.split(".")
    return int(words[2]) if words[:2] == ["model", "layers"] else None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
