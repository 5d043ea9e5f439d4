"""What a case must read and compute at least, and how fast this machine reads and computes at the moment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from launch.bench import Case
from worker.model_config import ModelConfig

SHARED = 1024  # tokens of the common prefix in the prefix cases


@dataclass(frozen=True, slots=True)
class Work:
    """Of the period that a case's value counts.

    Attributes:
        tokens: that the value counts.
        num_bytes: weights once a step, and the keys and values of every context once a step; a shared prefix once.
        flops: of linears and attention; a shared prefix is computed once.
    """

    tokens: int
    num_bytes: float
    flops: float

    def rate(self, read: float, gemm: float) -> float:
        """Tokens per second where the slower of reading (bytes/s) and computing (flop/s) is all that takes time."""
        return self.tokens / max(self.num_bytes / read, self.flops / gemm)


class Cost:
    """A model's numbers: flops and bytes of its parts."""

    def __init__(self, model: ModelConfig, element: int) -> None:
        shapes = model.tensor_shapes()
        self.head = model.vocab_size * model.hidden_size
        self.linears = sum(
            math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name.startswith("model.layers.")
        )
        self.weight_bytes = element * (self.linears + self.head)
        self.kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * element
        self._model = model

    def seen(self, start: int, stop: int) -> int:
        """Keys that queries at positions start .. stop attend, summed over queries and layers."""
        total = 0
        for window in self._model.windows:
            cut = min(max(window, start), stop) if window else stop  # from here on a query sees `window` keys
            total += (cut * (cut + 1) - start * (start + 1)) // 2 + (stop - cut) * window
        return total

    def flops(self, start: int, stop: int, samples: int) -> float:
        """Of a sequence's tokens start .. stop, of which `samples` need logits."""
        attention = 4 * self._model.num_heads * self._model.head_dim * self.seen(start, stop)
        return 2 * self.linears * (stop - start) + 2 * self.head * samples + attention


def work(case: Case, model: ModelConfig, element: int) -> Work:
    """The least that `case` takes on `model` with weights and pages of `element` bytes a number.

    The decodes of one case are taken to share every step that they can: as many steps as the longest output has.
    """
    cost = Cost(model, element)
    shapes = [(len(prompt), count) for prompt, count in case.jobs("roofline")]
    if case.kind == "prefill":
        return Work(case.size, cost.weight_bytes + cost.kv_bytes * case.size, cost.flops(0, case.size, 1))
    steps = max(count for _, count in shapes) - 1
    contexts = sum(length + step for length, count in shapes for step in range(1, count))
    flops = sum(cost.flops(length, length + count - 1, count - 1) for length, count in shapes)
    if case.kind in ("prefix", "prefixwarm"):
        contexts -= steps * SHARED * (len(shapes) - 1)
    num_bytes = float(steps * cost.weight_bytes + contexts * cost.kv_bytes)
    if case.kind in ("decode", "long"):
        return Work(sum(count - 1 for _, count in shapes), num_bytes, flops)
    known = SHARED if case.kind in ("prefix", "prefixwarm") else 0
    flops += sum(cost.flops(known, length, 1) for length, _ in shapes)
    if case.kind == "prefix":
        flops += cost.flops(0, SHARED, 0)
    return Work(sum(count for _, count in shapes), num_bytes + cost.weight_bytes, flops)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes/s of plain reading and flop/s of a large matrix product; `cpu_` per CPU second instead of wall second."""

    read: float
    gemm: float
    cpu_read: float
    cpu_gemm: float


class Probe:
    """Measures the ceilings, with torch."""

    def __init__(self, dtype: torch.dtype, threads: int, num_bytes: int = 1 << 28, size: int = 2048) -> None:
        """Args:
        num_bytes: that are read; more than the caches hold.
        size: of the square matrices that are multiplied.
        """
        self._threads = threads
        self._words = torch.ones(num_bytes // 4)
        self._left, self._right = (torch.randn(size, size).to(dtype) for _ in range(2))

    def measure(self) -> Ceilings:
        before = torch.get_num_threads()  # one, where an engine has threads of its own
        torch.set_num_threads(self._threads)
        wall, cpu = _best(self._words.sum)
        num_bytes = 4 * self._words.numel()
        gemm_wall, gemm_cpu = _best(lambda: self._left @ self._right)
        torch.set_num_threads(before)
        flops = 2 * self._left.shape[0] ** 3
        return Ceilings(num_bytes / wall, flops / gemm_wall, num_bytes / cpu, flops / gemm_cpu)


def _best(call: Callable[[], object], samples: int = 3) -> tuple[float, float]:
    """Least wall seconds and least CPU seconds."""
    walls, cpus = [], []
    for _ in range(samples):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)
