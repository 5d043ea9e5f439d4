"""What a step costs: a model of time and memory for one shard's layout on one kind of device. Plain arithmetic.

    stage    = layers * (products + elements + attention + collectives + launch) + head, for one micro-batch; it may end
               inside an MLP, whose other rows the next stage does
    cycle    = max(M * slowest stage, all stages and hand-overs), M = min(P, rows) micro-batches: a token for each row
    product  = as measured for so many rows, with the weights read as quickly as devices beside it leave
    attention = (reading^4 + multiplying^4)^(1/4) of keys and values: the slower, and more where the two are near
    memory   = weights + pages of all contexts + what a step and its exchanges hold + what a process takes

Not modelled: weights that fit in a cache, other programs on the machine, prefix hits, prompts that prefill beside
decodes, and pages that are unevenly spread by more than one.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pagetable.hardware import Hardware

_PLAN_COST = 16  # prompt tokens, as in worker/stages.py: a pipeline's prompts are cut by it
_BARRIERS = 9  # of a layer, where several threads share a device's step
_FLOAT = 4  # bytes of partial sums and partial attention


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model is the same on all ranks.

    Attributes:
        item_bytes: of a weight, 2 or 4.
        kv_row_bytes: of one token's K (or V) of one head.
    """

    hidden: int
    head_dim: int
    item_bytes: int
    kv_row_bytes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """The largest rank of one pipeline stage; its own numbers, but for `attended`, the query heads of its slice.

    Attributes:
        windows: of its layers; 0 is full attention.
        mlp: rows of a whole layer's MLP.
        weight_bytes: of its weights as they lie in memory.
        head_rows: of the vocabulary; 0 where the stage is not the last.
        left_mlp: of the rows of its last layer's MLP, those left to the next stage.
        carried_mlp: rows that the stage before left to it.
        border_in, border_out: rows in common with the stage before, and with the next one, which the first of the two
            does in a decode and the second in a chunk of a prompt. They are left, and not carried.
    """

    windows: tuple[int, ...]
    heads: int
    attended: int
    kv_heads: int
    mlp: int
    head_rows: int
    weight_bytes: int
    left_mlp: int = 0
    carried_mlp: int = 0
    border_in: int = 0
    border_out: int = 0

    def mlp_rows(self, is_prefill: bool) -> int:
        """Of all MLPs, in a chunk of prompts or a decode."""
        rows = len(self.windows) * self.mlp - self.left_mlp + self.carried_mlp
        return rows + (self.border_in if is_prefill else self.border_out)

    @property
    def num_halves(self) -> int:
        """Attentions and MLPs, whole or in part: each begins with a norm and ends with a sum."""
        return 2 * len(self.windows) + (self.carried_mlp > 0)


@dataclass(frozen=True, slots=True)
class Ways:
    """How devices are dealt: tensor, pipeline, page and data parallel sizes."""

    tensor: int = 1
    pipeline: int = 1
    page: int = 1
    data: int = 1

    @property
    def num_devices(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, slots=True)
class Workload:
    """What all shards do together: `batch` sequences of `context` tokens each, in steps of at most `chunk` tokens."""

    context: int
    batch: int
    chunk: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the device that needs most."""

    weights: float
    pages: float
    working: float
    reserve: float

    @property
    def total(self) -> float:
        return self.weights + self.pages + self.working + self.reserve


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one micro-batch (or chunk) on one stage, by what takes them."""

    products: float = 0.0
    elements: float = 0.0
    attention: float = 0.0
    collectives: float = 0.0
    head: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.elements + self.attention + self.collectives + self.head + self.overhead


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a layout does with a workload.

    Attributes:
        step_s: from one token of a sequence to its next.
        decode_tokens_per_s, prefill_tokens_per_s: of all shards.
        ttft_s: of one prompt of `context` tokens on an idle shard.
        slowest: a decoding micro-batch on the slowest stage.
        num_micro_batches: in which a shard's sequences decode, and the rows of the largest.
    """

    ways: Ways
    step_s: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    ttft_s: float
    memory: Memory
    slowest: Times
    num_micro_batches: int
    rows: int


class Cost:
    """The model of one layout: `predict` for a workload, `memory` for what it takes."""

    def __init__(self, hardware: Hardware, model: Model, ways: Ways, stages: Sequence[Stage]) -> None:
        """Args:
        stages: one for each of the P stages, in order.
        """
        if len(stages) != ways.pipeline:
            raise ValueError(f"stages: got {len(stages)}, must be {ways.pipeline}")
        if ways.page < 1 or ways.tensor % ways.page:
            raise ValueError(f"page: got {ways.page}, must divide {ways.tensor}")
        self.hardware, self.model, self.ways, self.stages = hardware, model, ways, tuple(stages)
        on_host = min(ways.num_devices, hardware.devices_per_host)
        self._read = min(hardware.read_bytes_per_s, hardware.host_read_bytes_per_s / on_host)
        self._share = 1.0 if model.item_bytes == 2 else hardware.float32_share

    def predict(self, load: Workload) -> Prediction:
        sequences = -(-load.batch // self.ways.data)
        count = min(self.ways.pipeline, sequences)
        rows = -(-sequences // count)
        times = [self.decode(stage, rows, load) for stage in self.stages]
        times = [self._told(each, index, rows) for index, each in enumerate(times)]
        slowest = max(times, key=lambda each: each.total)
        hand_overs = sum(self._hand_over(stage, rows) for stage in self.stages[:-1])
        through = sum(each.total for each in times) + hand_overs
        step = max(count * slowest.total, through)
        return Prediction(
            ways=self.ways,
            step_s=step,
            decode_tokens_per_s=load.batch / step,
            prefill_tokens_per_s=load.batch * load.context / self.prefill(load, sequences),
            ttft_s=self.prefill(load, 1),
            memory=self.memory(load),
            slowest=slowest,
            num_micro_batches=count,
            rows=rows,
        )

    def decode(self, stage: Stage, rows: int, load: Workload) -> Times:
        """One micro-batch of `rows` sequences with one token each."""
        attention = sum(
            count * self._decode_attention(stage, rows, min(window or load.context, load.context), load)
            for window, count in Counter(stage.windows).items()
        )
        return dataclasses.replace(
            self._step(stage, rows, attention, is_prefill=False),
            head=self._head(stage, rows),
            overhead=self._launch(stage),
        )

    def prefill(self, load: Workload, sequences: int) -> float:
        """Seconds from nothing to the first tokens of so many prompts, one after another.

        Prompts shorter than a chunk share steps; a longer one goes through the stages chunk by chunk.
        """
        most = self.chunk(load, sequences)
        together = min(sequences, max(1, most // load.context))
        kinds = list(dict.fromkeys(self.stages))  # most stages are alike
        kind_of = [kinds.index(stage) for stage in self.stages]
        ends = [0.0] * len(self.stages)
        busy = [0.0] * len(self.stages)
        for start in range(0, load.context, most):
            size = min(most, load.context - start)
            is_last = start + size == load.context
            times = [self._chunk(stage, start, size, together, is_last) for stage in kinds]
            hand_overs, before = [self._hand_over(stage, size * together) for stage in kinds], 0.0
            for index, kind in enumerate(kind_of):
                seconds = self._told(times[kind], index, together).total
                busy[index] += seconds
                ends[index] = max(before, ends[index]) + seconds
                before = ends[index] + hand_overs[kind]
        return ends[-1] + (sequences / together - 1) * max(busy)

    def chunk(self, load: Workload, sequences: int) -> int:
        """Prompt tokens of a step: fewer than allowed where a pipeline needs several steps to fill its stages."""
        if self.ways.pipeline == 1:
            return load.chunk
        piece = math.isqrt(sequences * load.context * _PLAN_COST // (self.ways.pipeline - 1))
        return min(load.chunk, max(1, -(-piece // load.block_size)) * load.block_size)

    def memory(self, load: Workload) -> Memory:
        """Of the stage whose device needs most."""
        sequences = -(-load.batch // self.ways.data)
        pages = -(-sequences * -(-load.context // load.block_size) // self.ways.page)

        def of(stage: Stage) -> Memory:
            block = 2 * len(stage.windows) * stage.kv_heads * load.block_size * self.model.kv_row_bytes
            return Memory(stage.weight_bytes, pages * block, self._working(stage, load), self.hardware.reserve_bytes)

        return max((of(stage) for stage in self.stages), key=lambda each: each.total)

    def product_s(self, rows: int, weights: float) -> float:
        """Seconds to multiply `rows` rows with `weights` numbers.

        What was measured for so many rows (bfloat16, one device that reads alone) is reading and multiplying mixed as
        `_mixed` does; taken apart, reading can be replaced by that of these weights at the rate which is left.
        """
        known = self._product_s(rows)
        alone = min(known, 2 / self.hardware.read_bytes_per_s)
        multiplying = (known**4 - alone**4) ** 0.25
        return weights * _mixed(self.model.item_bytes / self._read, multiplying / self._share)

    def _product_s(self, rows: int) -> float:
        """Seconds for one weight, as measured."""
        known = self.hardware.product_flops
        at = bisect_left(known, (rows, 0.0))
        if at == len(known):
            return 2 * rows / known[-1][1]
        high, rate = known[at]
        if high == rows:
            return 2 * rows / rate
        low, low_rate = known[at - 1]
        begin, end = 2 * low / low_rate, 2 * high / rate
        return begin + (end - begin) * (rows - low) / (high - low)

    def _step(self, stage: Stage, tokens: int, attention: float, is_prefill: bool) -> Times:
        """The layers over `tokens` tokens; head and overhead are still missing."""
        layers, hidden, dim = len(stage.windows), self.model.hidden, self.model.head_dim
        qkv = (stage.heads + 2 * stage.kv_heads) * dim
        mlp_rows = stage.mlp_rows(is_prefill)
        weights = hidden * (layers * (qkv + stage.heads * dim) + 3 * mlp_rows)
        numbers = 2 * stage.num_halves * hidden + layers * (qkv + stage.attended * dim) + mlp_rows
        return Times(
            products=self.product_s(tokens, weights),
            elements=tokens * numbers / self.hardware.elements_per_s,
            attention=attention,
            collectives=self._collectives(stage, tokens),
        )

    def _chunk(self, stage: Stage, start: int, size: int, prompts: int, is_last: bool) -> Times:
        """`size` tokens at `start` of each of `prompts` prompts."""
        attention = sum(
            count * self._prefill_attention(stage, start, size, window)
            for window, count in Counter(stage.windows).items()
        )
        return dataclasses.replace(
            self._step(stage, size * prompts, attention * prompts, is_prefill=True),
            head=self._head(stage, prompts) if is_last else 0.0,
            overhead=self._launch(stage),
        )

    def _decode_attention(self, stage: Stage, rows: int, seen: int, load: Workload) -> float:
        pages = -(-rows * -(-seen // load.block_size) // self.ways.page)  # of the group that has most
        keys = min(rows * seen, pages * load.block_size)
        return self._attention(stage, keys, keys, self.hardware.attention_decode_flops)

    def _prefill_attention(self, stage: Stage, start: int, size: int, window: int) -> float:
        end = start + size
        cut = min(max(window, start), end) if window else end  # from here on a query sees `window` keys
        pairs = (cut * (cut + 1) - start * (start + 1)) / 2 + (end - cut) * window
        keys = min(end, window + size) if window else end
        groups = self.ways.page
        return self._attention(stage, keys / groups, pairs / groups, self.hardware.attention_prefill_flops)

    def _attention(self, stage: Stage, keys: float, pairs: float, flops: float) -> float:
        """`keys` are read once for all heads, `pairs` of query and key multiplied for each."""
        num_bytes = 2 * keys * stage.kv_heads * self.model.kv_row_bytes
        reading = num_bytes / (self._read * self.hardware.attention_read_share)
        computing = 4 * pairs * stage.attended * self.model.head_dim / (flops * self._share)
        return _mixed(reading, computing)

    def _head(self, stage: Stage, rows: int) -> float:
        if not stage.head_rows:
            return 0.0
        best = self._collective(self.ways.tensor, rows * 12) if self.ways.tensor > 1 else 0.0
        return self.product_s(rows, stage.head_rows * self.model.hidden) + best

    def _launch(self, stage: Stage) -> float:
        barriers = _BARRIERS * self.hardware.barrier_s if self.hardware.threads > 1 else 0.0
        return stage.num_halves / 2 * (self.hardware.layer_s + barriers)

    def _told(self, times: Times, stage: int, rows: int) -> Times:
        """With the leader's planning, and messages: its plan to all other ranks, and the last stage's result."""
        messages = self.ways.tensor * self.ways.pipeline - 1 if stage == 0 else 1
        if 0 < stage == self.ways.pipeline - 1:
            messages += 1
        told = messages * self.hardware.plan_s
        if stage == 0:
            told += self.hardware.step_s + rows * self.hardware.row_s
        return dataclasses.replace(times, overhead=times.overhead + told)

    def _collectives(self, stage: Stage, tokens: int) -> float:
        """Two sums a layer over T ranks; queries and partial attention over the G ranks of a slice."""
        if self.ways.tensor == 1:
            return 0.0
        num_bytes = tokens * self.model.hidden * self.hardware.activation_bytes
        seconds = stage.num_halves * self._collective(self.ways.tensor, num_bytes)
        if self.ways.page > 1:
            layers, row = len(stage.windows), self.model.head_dim
            seconds += layers * self._gather(self.ways.page, tokens * stage.heads * row * self.model.item_bytes)
            # each rank needs its own heads of all partials
            seconds += layers * self._gather(self.ways.page, tokens * stage.heads * (row + 1) * _FLOAT)
        return seconds

    def _collective(self, ranks: int, num_bytes: float) -> float:
        """A sum over `ranks` of so many bytes each."""
        turns = ranks if self.hardware.collective == "exchange" else 2 * (ranks - 1) / ranks
        latency, rate = self._link(ranks)
        return latency + turns * num_bytes / rate

    def _gather(self, ranks: int, num_bytes: float) -> float:
        latency, rate = self._link(ranks)
        turns = ranks if self.hardware.collective == "exchange" else ranks - 1
        return latency + turns * num_bytes / rate

    def _hand_over(self, stage: Stage, tokens: int) -> float:
        """Of hidden rows to the next stage, and of as many partial sums of a cut MLP; nothing where there is none."""
        if self.ways.pipeline == 1:
            return 0.0
        latency, rate = self._link(self.ways.pipeline * self.ways.tensor)
        rows = tokens * (2 if stage.left_mlp else 1)
        return latency + rows * self.model.hidden * self.hardware.activation_bytes / rate

    def _link(self, ranks: int) -> tuple[float, float]:
        """(seconds, bytes/s) between so many ranks that follow one another."""
        hardware = self.hardware
        if ranks <= hardware.devices_per_host:
            return hardware.exchange_s, hardware.exchange_bytes_per_s
        return hardware.network_exchange_s, hardware.network_bytes_per_s

    def _working(self, stage: Stage, load: Workload) -> float:
        """What a step of `chunk` tokens holds, logits of all rows, and the regions that peers read."""
        sequences, dim = -(-load.batch // self.ways.data), self.model.head_dim
        own = (stage.heads + 2 * stage.kv_heads) * dim
        streams = 4 if stage.left_mlp or stage.carried_mlp else 3
        numbers = streams * self.model.hidden + own + 2 * stage.attended * dim + stage.mlp
        regions = 2 * self.model.hidden * (self.ways.tensor > 1) + 2 * stage.attended * (dim + 1) * (self.ways.page > 1)
        return _FLOAT * (load.chunk * (numbers + regions) + sequences * stage.head_rows)


def _mixed(reading: float, multiplying: float) -> float:
    """The slower of two that run at once, and 19 % more where they are equal."""
    return math.sqrt(math.hypot(reading**2, multiplying**2))
