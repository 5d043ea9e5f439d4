"""A shard's ranks as threads of this process, with a runner of the test's own: epochs in milliseconds, no weights."""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.peers import Ring
from kernels.rank import Progress
from pagetable.ids import PlanNumber
from worker.codec import decode_plan
from worker.group import Group
from worker.layout import Layout, Part
from worker.model_config import ModelConfig
from worker.plan import Plan, StepResult
from worker.rank import Rank
from worker.ranks import Ranks
from worker.segment import Sizes

SECRET = b"t" * 32
IDENTITY = b"i" * 32
SIZES = Sizes(tensor=4096, slice=4096, ring=4096)
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
Act = Callable[["Recorder", Plan], None]


def _nothing(runner: Recorder, plan: Plan) -> None:
    pass


def model(folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(_MODEL))
    return ModelConfig.from_folder(folder)


@dataclass
class Recorder:
    """A runner that meets the other ranks and adds up what they say; `act` comes first and may do anything.

    Attributes:
        seen: numbers of the plans of all epochs.
        resets: the epochs' groups, None for each end.
    """

    part: Part
    act: Act
    seen: list[int] = field(default_factory=list)
    resets: list[int | None] = field(default_factory=list)
    group: Group | None = None
    cache: Any = None

    def reset(self, group: Group | None) -> None:
        self.group = group
        self.resets.append(None if group is None else group.epoch)

    @property
    def answers(self) -> bool:
        return self.part.is_last and self.part.tensor_rank == 0

    def follow(self, plans: Ring, progress: Progress) -> None:
        """It takes each plan by itself."""

    def run_encoded(self, data: bytes) -> StepResult | None:
        return self.run(decode_plan(data))

    def run(self, plan: Plan, data: bytes = b"") -> StepResult | None:
        """Rank r of a stage gives r + 1 + the plan's number; stages add theirs up. The last one's sum is the token."""
        self.seen.append(plan.number)
        self.act(self, plan)
        group = self.group
        total = 0
        assert group is not None
        if group.previous is not None:
            tag, message = group.previous.receive()
            assert tag == plan.number
            total = int(message.view(torch.int64).item())
            group.previous.release()
        if group.tensor is not None:
            group.tensor.own(8).view(torch.int64)[0] = self.part.tensor_rank + 1 + plan.number
            total += sum(int(each.view(torch.int64).item()) for each in group.tensor.exchange(8))
        if group.next is not None:
            group.next.slot()[:8].view(torch.int64)[0] = total
            group.next.publish(plan.number, 8)
        if self.answers:
            return StepResult(plan.number, array("i", (total,)))
        return None


class Threads:
    """A leader and its ranks.

    Attributes:
        ranks: the leader.
        runners: of all ranks, by number.
    """

    def __init__(self, model: ModelConfig, layout: Layout, acts: dict[int, Act] | None = None, port: int = 0) -> None:
        self.layout = layout
        self.parts = layout.parts(model)
        self.runners = [Recorder(part, (acts or {}).get(part.rank, _nothing)) for part in self.parts]
        self.lead(port)
        self.followers: dict[int, tuple[Rank, threading.Thread]] = {}
        self.fenced: list[str] = []

    def lead(self, port: int = 0) -> None:
        """Be a leader, perhaps the next one."""
        self.overs: list[str] = []
        self.ranks = Ranks(self.parts[0], SIZES, IDENTITY, SECRET, on_over=self.overs.append)
        self.ranks.runner = self.runners[0]  # type: ignore[assignment]
        self.address = self.ranks.listen("127.0.0.1", port)

    def follow(self, number: int, identity: bytes = IDENTITY) -> Rank:
        rank = Rank(
            self.parts[number],
            self.runners[number],  # type: ignore[arg-type]
            SIZES,
            identity,
            SECRET,
            self.address,
            on_fence=self.fenced.append,
        )
        thread = threading.Thread(target=rank.run, name=f"rank {number}")
        thread.start()
        self.followers[number] = rank, thread
        return rank

    def follow_all(self) -> None:
        for number in range(1, self.layout.num_ranks):
            self.follow(number)

    def step(self, number: int) -> int:
        """One plan, and the token that comes of it."""
        self.ranks.send(Plan(PlanNumber(number)))
        return self.ranks.receive().tokens[0]

    def expected(self, number: int) -> int:
        """What `step` must say."""
        size = self.layout.tensor
        return self.layout.pipeline * (size * (size + 1) // 2 + size * number) if size > 1 else 0

    def close(self) -> None:
        self.ranks.close()
        self.ranks.leave()
        for rank, _ in self.followers.values():
            rank.stop()
        for _, thread in self.followers.values():
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def threads(
    model: ModelConfig, layout: Layout, acts: dict[int, Act] | None = None, follow: bool = True
) -> Iterator[Threads]:
    found = Threads(model, layout, acts)
    try:
        if follow:
            found.follow_all()
        yield found
    finally:
        found.close()
