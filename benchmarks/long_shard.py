"""One engine over several devices whose steps are measured: time, CPU, metadata, activations, rows."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.llm import LLM
from worker.plan import Plan
from worker.ranks import Ranks

ROOM = 64  # tokens behind the context: answers, and questions of the recall model
AT_ONCE = 8  # requests
PROGRESS_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run.

    Attributes:
        length: tokens of the context.
        share: of the context's pages that one device has blocks for.
        step_tokens: of a prompt in one step.
    """

    length: int
    devices: int = 8
    share: float = 0.14
    block_size: int = 16
    step_tokens: int = 1024
    seed: int = 0

    @property
    def device_blocks(self) -> int:
        pages = -(-self.length // self.block_size)
        return int(pages * self.share) + 1


@dataclass(frozen=True, slots=True)
class Step:
    """One step as the leader saw it.

    Attributes:
        context: tokens behind it.
        cpu: seconds of all ranks together.
        metadata: bytes of plans, to all ranks together.
        sums, attention: bytes that each rank gave to all: partial sums and the head's; queries and partial attention.
    """

    context: int
    tokens: int
    seconds: float
    cpu: float
    metadata: int
    sums: int
    attention: int


class Shard:
    """An engine over all devices whose steps are measured.

    Attributes:
        steps: all so far.
        rows: position -> float32 [hidden], the residual stream behind the last layer, where `wanted` names it.
    """

    def __init__(self, llm: LLM, ranks: Ranks) -> None:
        self.llm, self.ranks = llm, ranks
        self.steps: list[Step] = []
        self.wanted: set[int] = set()
        self.rows: dict[int, torch.Tensor] = {}
        self._plan: Plan | None = None
        llm.loop.on_plan = self._see
        runner = ranks.runner
        assert runner is not None and runner.group is not None
        assert runner.group.tensor is not None and runner.group.slice is not None
        self._runner = runner
        self._sums, self._attention = runner.group.tensor.struct, runner.group.slice.struct
        forward: Callable[..., torch.Tensor] = runner.model.forward

        def watched(batch: Any, *arguments: Any, **others: Any) -> torch.Tensor:
            hidden = forward(batch, *arguments, **others)
            for row, position in enumerate(batch.positions.tolist() if self.wanted else ()):
                if position in self.wanted:
                    self.rows[position] = hidden[row].clone()
            return hidden

        runner.model.forward = watched  # type: ignore[method-assign, assignment]
        run_plain = runner.run_plain
        # rows that are wanted must pass through here
        runner.run_plain = lambda data: None if self.wanted else run_plain(data)  # type: ignore[method-assign]

    @property
    def cpu(self) -> float:
        return sum(map(cpu_seconds, self.llm.pids))

    def step(self) -> None:
        """One step of the engine."""
        self._plan = None
        before = (self.cpu, self.ranks.num_plan_bytes, self._sums.given, self._attention.given)
        began = time.perf_counter()
        self.llm.step()
        seconds = time.perf_counter() - began
        after = (self.cpu, self.ranks.num_plan_bytes, self._sums.given, self._attention.given)
        cpu, *counts = (b - a for a, b in zip(before, after, strict=True))
        plan: Plan | None = self._plan
        if plan is not None and plan.num_rows == 1:
            context = plan.first_position[0] + plan.num_tokens
            self.steps.append(Step(context, plan.num_tokens, seconds, cpu, *map(int, counts)))
            if plan.num_tokens > 1 and context % PROGRESS_TOKENS == 0:
                rate = 1e3 * seconds / plan.num_tokens
                print(f"{context:,} tokens are there; {rate:.3f} ms a token", file=sys.stderr, flush=True)

    def run(self, prompt: Sequence[int], outputs: int) -> tuple[list[int], list[tuple[int, int]], list[Step]]:
        """One request to its end: its outputs, its pages, its steps."""
        first = len(self.steps)
        name = self.llm.add_request(
            {"prompt_token_ids": prompt, "max_tokens": outputs, "temperature": 0.0, "ignore_eos": True}
        )
        while self.llm.loop.has_work:
            self.step()
        (sample,) = self.llm.pop(name).outputs
        return sample.token_ids, sample.pages, self.steps[first:]

    def _see(self, plan: Plan) -> None:
        self._plan = plan


@contextmanager
def shard(folder: Path, settings: Settings) -> Iterator[Shard]:
    """Start a process for each device. Errors as `LLM`."""
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        block_size=settings.block_size,
        max_model_len=settings.length + ROOM,
        num_gpu_blocks_override=settings.devices * settings.device_blocks,
        max_num_seqs=AT_ONCE,
        max_num_batched_tokens=settings.step_tokens,
        tensor_parallel_size=settings.devices,
        page_parallel_size=settings.devices,
        threads=1,
        seed=settings.seed,
    )
    try:
        ranks = llm.loop.pipe
        assert isinstance(ranks, Ranks), "several devices are several ranks"
        yield Shard(llm, ranks)
    finally:
        llm.close()


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process so far, to the kernel's hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes(pid: int) -> int:
    """Of memory that a process had resident at once."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/{pid}/status has no VmHWM")
