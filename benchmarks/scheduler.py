"""The scheduler's own CPU time per step, and where it goes. No model runs: every sample is the token 7.

    python -m benchmarks.scheduler [--json] [--seqs 64,256] [--length 1000] [--steps 200]

From the repository's root. Steps are timed whole, in CPU time of the thread. The parts are found in further runs, with
one function wrapped by a timer at a time and the timer's own cost taken off: they say where time goes, the whole steps
say how much it is. Parts contain those that are indented below them. `loops` is the time in thousands of turns of a
trivial Python loop timed between the cases: it compares across machines and loads where microseconds do not.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.timing import Report, Target, timed, timer_cost
from launch.machine import sleep_while_waiting
from pagetable.allocator import BlockAllocator
from pagetable.block_table import BlockTable
from pagetable.ids import DeviceId
from pagetable.page import PagePool
from pagetable.prefix_tree import extend_digests, root_digest
from pagetable.sampling import Request, SamplingParams
from worker.config import ShardConfig
from worker.plan import Plan, StepResult
from worker.scheduler import ShardScheduler
from worker.sequence import State, TokenOutput
from worker.step import Step

BLOCK_SIZE, TOKEN, GOAL_US = 16, 7, 1000.0

# (name, depth, what is timed)
PARTS: list[tuple[str, int, list[Target]]] = [
    ("schedule", 0, [(ShardScheduler, "schedule")]),
    ("decodes", 1, [(ShardScheduler, "_plan_decode")]),
    ("book rows", 2, [(Step, "append")]),
    ("table append", 3, [(BlockTable, "append")]),
    ("seal", 3, [(Step, "seal")]),
    ("book samples", 2, [(Step, "sample")]),
    ("prompts", 1, [(ShardScheduler, "_plan_prompts")]),
    ("write", 1, [(Step, "write")]),
    ("retire", 0, [(ShardScheduler, "retire")]),
    ("pages", 1, [(PagePool, "publish"), (PagePool, "retire")]),
    ("outputs", 1, [(TokenOutput, "__init__")]),
]


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences that all decode, and who waits meanwhile.

    Attributes:
        sharing: prefix caching.
        waiting: further requests in the queue.
        wants: `slot` or `pages`: what the waiting ones lack.
        together: all sequences fill their pages in the same step, instead of evenly over the steps.
        shared_prefix: tokens that the waiting requests have in common with each other and with cached pages.
    """

    num_seqs: int
    length: int
    sharing: bool = True
    waiting: int = 0
    wants: str = "slot"
    together: bool = False
    shared_prefix: int = 0

    @property
    def name(self) -> str:
        text = f"{self.num_seqs} x {self.length}, sharing {'on' if self.sharing else 'off'}"
        if self.together:
            text += ", in lockstep"
        if self.waiting:
            text += f", {self.waiting} wait for {'a slot' if self.wants == 'slot' else 'pages'}"
        if self.shared_prefix:
            text += f" behind {self.shared_prefix} cached tokens"
        return text


def prompt(seed: str, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(4096), k=length))


def request(name: str, tokens: Sequence[int], most: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, seed=0)
    return Request(request_id=name, prompt=tuple(tokens), params=params)


class Shard:
    """A scheduler in the middle of its work: all sequences of `case` decode, and are `length` tokens long after half
    of `steps`."""

    def __init__(self, case: Case, steps: int) -> None:
        start = max(1, case.length - steps // 2)
        lengths = [start + (0 if case.together else i % BLOCK_SIZE) for i in range(case.num_seqs)]
        most = steps + 2 * BLOCK_SIZE
        self.num_blocks = sum(-(-(length + most) // BLOCK_SIZE) for length in lengths)
        prefix = prompt("prefix", case.shared_prefix)
        self.num_blocks += case.shared_prefix // BLOCK_SIZE
        slots = case.num_seqs + (case.waiting if case.wants == "pages" else 0)
        config = ShardConfig(
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=self.num_blocks * BLOCK_SIZE,
            max_num_seqs=slots,
            max_num_batched_tokens=slots + sum(lengths) + BLOCK_SIZE,  # all prompts in one step: none runs ahead
            enable_prefix_caching=case.sharing,
        )
        self.scheduler = ShardScheduler(config, PagePool([[BlockAllocator(DeviceId(0), self.num_blocks)]]))
        if prefix:
            self.scheduler.add(request("first", prefix, 1))
            while self.scheduler.has_work:
                self.step()
        for index, length in enumerate(lengths):
            self.scheduler.add(request(f"run-{index}", prompt(f"run-{index}", length), most))
        while any(s.state is not State.DECODE for s in self.scheduler.sequences()):
            self.step()
        own = case.length
        if case.wants == "pages":  # one more than are free beside the prefix and a page for each that runs
            pages = self.scheduler.pool.num_available - len(prefix) // BLOCK_SIZE - case.num_seqs + 1
            own = pages * BLOCK_SIZE
        rest = prompt("rest", own)
        for index in range(case.waiting):
            first = prompt(f"wait-{index}", min(own, BLOCK_SIZE))
            self.scheduler.add(request(f"wait-{index}", prefix + first + rest[len(first) :], 1))
        self.step()  # digests of those that wait are computed when they are first looked at

    def answer(self, plan: Plan) -> StepResult:
        return StepResult(plan.number, array("i", [TOKEN]) * len(plan.sample_row))

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        assert plan is not None, "sequences run, so there is a plan"
        self.scheduler.retire(self.answer(plan))
        return plan


def time_steps(shard: Shard, case: Case, steps: int) -> list[int]:
    """CPU nanoseconds of `schedule` and `retire` together, for each step."""
    now, scheduler, found = time.thread_time_ns, shard.scheduler, []
    for _ in range(steps):
        start = now()
        plan = scheduler.schedule()
        middle = now()
        assert plan is not None and len(plan.sample_row) == case.num_seqs, "every sequence is in every plan"
        result = shard.answer(plan)
        again = now()
        scheduler.retire(result)
        found.append(now() - again + middle - start)
    return found


def time_part(shard: Shard, case: Case, targets: list[Target], steps: int) -> list[float]:
    """Nanoseconds of one part for each step, less what the timer costs."""
    cost, found = timer_cost(), []
    with timed(targets) as spent:
        for _ in range(steps):
            spent[:] = 0, 0
            assert len(shard.step().sample_row) == case.num_seqs, "every sequence is in every plan"
            found.append(max(0.0, spent[0] - cost * spent[1]))
    return found


def time_ranks(shard: Shard, steps: int) -> tuple[list[int], list[int]]:
    """CPU nanoseconds of a rank's `apply` and `batch`, for the plans of `steps` steps."""
    from worker.tables import TableMirror

    config = shard.scheduler.config
    mirror = TableMirror(config.max_num_seqs, shard.num_blocks, BLOCK_SIZE)
    for sequence in shard.scheduler.running:
        mirror.tables[sequence.slot, : len(sequence.table)] = [shard.scheduler.pool.block(p) for p in sequence.table]
    now, applies, batches = time.thread_time_ns, [], []
    for _ in range(steps):
        plan = shard.step()
        start = now()
        mirror.apply(plan)
        middle = now()
        mirror.batch(plan, (0,))
        batches.append(now() - middle)
        applies.append(middle - start)
    return applies, batches


def time_long_prompt(length: int, repeats: int) -> dict[str, list[int]]:
    """CPU nanoseconds of what a `length`-token prompt costs whose prefix is cached: its hashes, the look-up of its
    pages, and the step that admits it, hashes and look-ups included."""
    blocks = 2 * -(-length // BLOCK_SIZE) + 8
    config = ShardConfig(num_blocks=blocks, block_size=BLOCK_SIZE, max_model_len=length + 1)
    scheduler = ShardScheduler(config, PagePool([[BlockAllocator(DeviceId(0), blocks)]]))
    tokens = prompt("long", length)
    found: dict[str, list[int]] = {"hash": [], "look up": [], "admitting step": []}
    now = time.thread_time_ns
    for repeat in range(repeats + 1):  # the first fills the pages
        scheduler.add(request(f"long-{repeat}", tokens, 1))
        while scheduler.has_work:
            start = now()
            plan = scheduler.schedule()
            spent = now() - start
            assert plan is not None
            if repeat:
                assert plan.num_tokens <= BLOCK_SIZE, "all but the last page is found"
                found["admitting step"].append(spent)
            scheduler.retire(StepResult(plan.number, array("i", [TOKEN]) * len(plan.sample_row)))
        digests: list[bytes] = []
        start = now()
        extend_digests(digests, root_digest(b""), array("i", tokens), BLOCK_SIZE, (length - 1) // BLOCK_SIZE)
        middle = now()
        pages = scheduler.pool.tree.match(digests)
        if repeat:
            found["look up"].append(now() - middle)
            found["hash"].append(middle - start)
        assert len(pages) == len(digests)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of tables")
    parser.add_argument("--seqs", default="64,256", help="running sequences, comma separated (64,256)")
    parser.add_argument("--length", type=int, default=1000, help="tokens of each, on average (1000)")
    parser.add_argument("--waiting", type=int, default=1000, help="requests in the queue, in the cases with one (1000)")
    parser.add_argument("--long", type=int, default=32768, help="tokens of the long prompt (32768)")
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each case (200)")
    options = parser.parse_args(argv)
    sleep_while_waiting()
    counts = [int(text) for text in options.seqs.split(",")]
    first, steps, length = counts[0], options.steps, options.length
    part_steps = max(2, steps // 8)
    cases = [Case(count, length, sharing) for count in counts for sharing in (True, False)]
    cases += [
        Case(first, length, together=True),
        Case(first, length, waiting=options.waiting),
        Case(first, length, waiting=options.waiting, wants="pages"),
        Case(first, length, waiting=min(64, options.waiting), wants="pages", shared_prefix=options.long),
    ]
    report = Report(options.json)
    for case in cases:
        report.begin(case.name)
        shard = Shard(case, steps + len(PARTS) * part_steps)
        median = report.whole("step", time_steps(shard, case, steps))
        for name, depth, targets in PARTS if not case.together else ():
            report.part(name, depth + 1, time_part(shard, case, targets, part_steps))
        if case == Case(64, 1000) and not options.json:
            print(f"  goal: a step under {GOAL_US:.0f} us: {'met' if median < GOAL_US else 'missed'}")
    report.begin(f"{first} x {length}, on each rank")
    applies, batches = time_ranks(Shard(Case(first, length), steps), steps)
    report.whole("TableMirror.apply", applies)
    report.whole("TableMirror.batch", batches)
    report.begin(f"a prompt of {options.long} tokens whose pages are cached")
    for name, samples in time_long_prompt(options.long, max(2, steps // 20)).items():
        report.whole(name, samples)
    report.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
