"""A shard in a simulator: the real scheduler over a fake device whose tokens depend on every byte read.

The fake device has P stages of G groups, a rank with a pool and tables of its own for each. It runs plans as a
pipeline: a stage takes the plans in their order, each when the stage before is done with it, and how far plans have
come is drawn, so plan n + 1 has begun before plan n ends. Ranks write and read the pages of their group only; what they
read is summed over the groups. What a position writes is a hash of all that it read before, in every stage; the next
token is a hash of that. So a page that is stale, swapped, half-written, of another sequence or in no group's reach
becomes a wrong token, which the unpaged `Reference` finds at once. A block that is handed out is scribbled over at that
moment, as an incoming transfer would: whoever still reads it by an older plan reads garbage.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice

from pagetable.allocator import BlockAllocator
from pagetable.errors import InvalidRequest, StalePage
from pagetable.ids import BlockId, DeviceId, LogicalPageId, PageRef, block_of, generation_of
from pagetable.page import PagePool
from pagetable.sampling import Request, SamplingParams
from worker.config import ShardConfig
from worker.plan import Plan, StepResult
from worker.scheduler import ShardScheduler
from worker.sequence import FinishReason, Sequence, State, TokenOutput

MASK = (1 << 64) - 1
VOCAB = 23
EOS = 0


def mix(*values: int) -> int:
    x = 0x9E3779B97F4A7C15
    for value in values:
        x = ((x ^ (value & MASK)) * 0xBF58476D1CE4E5B9) & MASK
        x ^= x >> 29
    return x


def draw(hidden: int, seed: int, sample_index: int, position: int) -> int:
    return mix(hidden, seed, sample_index, position) % VOCAB


class Reference:
    """The same function without pages: feed tokens, ask for the next."""

    def __init__(self, request: Request, sample_index: int, forced: tuple[int, ...] = (), num_stages: int = 1) -> None:
        self.request, self.sample_index = request, sample_index
        self.sums = [0] * num_stages
        self.position = 0
        self.hidden = 0
        self.emitted = 0
        for token in (*request.prompt, *forced):
            self.feed(token)
        self.emitted = len(forced)

    def feed(self, token: int) -> None:
        x = mix(token, self.position)
        for stage in range(len(self.sums)):
            self.sums[stage] = (self.sums[stage] + (2 * self.position + 1) * x) & MASK
            x = mix(self.sums[stage], stage)
        self.hidden = x
        self.position += 1

    def next(self) -> int:
        assert self.request.params.seed is not None
        token = draw(self.hidden, self.request.params.seed, self.sample_index, self.position)
        self.feed(token)
        self.emitted += 1
        return token


class Rank:
    """One rank's pool and block tables, changed by plans only. It knows the blocks of its stage and its group."""

    def __init__(self, stage: int, group: int, num_blocks: int, block_size: int) -> None:
        self.stage, self.group, self.block_size = stage, group, block_size
        self.pool = [[0] * block_size for _ in range(num_blocks)]
        self.tables: dict[int, dict[int, int]] = {}

    def write(self, plan: Plan, x: list[int], incoming: list[tuple[int, list[int]]]) -> None:
        """Admits, table changes, copies, then K and V of all tokens whose pages are here."""
        size = self.block_size
        for admit in plan.admits:
            self.tables[admit.slot] = {}
        changes = zip(plan.table_slot, plan.table_index, plan.table_group, plan.table_blocks[self.stage], strict=True)
        for slot, index, group, block in changes:
            self.tables[slot].pop(index, None)
            if group == self.group:
                self.tables[slot][index] = block
        for block, values in incoming:
            self.pool[block] = values
        for row, slot in enumerate(plan.slots):
            table, first = self.tables[slot], plan.first_position[row]
            for t in range(plan.query_start[row], plan.query_start[row + 1]):
                position = first + t - plan.query_start[row]
                if position // size in table:
                    self.pool[table[position // size]][position % size] = x[t]

    def attend(self, plan: Plan) -> list[tuple[int, int]]:
        """For each token of the plan, a sum over the positions before it that are here, and how many they are."""
        size, out = self.block_size, []
        for row, slot in enumerate(plan.slots):
            table, first = self.tables[slot], plan.first_position[row]
            total = count = 0
            for position in range(first + plan.query_start[row + 1] - plan.query_start[row]):
                if position // size in table:
                    value = self.pool[table[position // size]][position % size]
                    total, count = (total + (2 * position + 1) * value) & MASK, count + 1
                if position >= first:
                    out.append((total, count))
        return out


class FakeDevice:
    """All ranks, and the plans between the stages.

    Args:
        sizes: blocks of each pool by stage and group.
        back: tokens that plan n leaves open are those of plan n - back.
        rng: how far plans come before they have to.
    """

    def __init__(self, sizes: list[list[int]], block_size: int, back: int, rng: random.Random) -> None:
        self.ranks = [
            [Rank(stage, group, blocks, block_size) for group, blocks in enumerate(groups)]
            for stage, groups in enumerate(sizes)
        ]
        self.samplers: dict[int, tuple[int, int]] = {}
        self.back, self.rng = back, rng
        self.plans: list[tuple[Plan, list[list[int]]]] = []  # with what each stage that is done with it gave
        self.results: dict[int, array[int]] = {}  # tokens by number of the plan, of late
        self.num_filled = 0  # tokens that plans left open
        self.num_moves = 0  # of pages between groups

    def submit(self, plan: Plan) -> None:
        self.plans.append((plan, []))
        for _ in range(self.rng.randrange(2 * len(self.ranks))):
            self.advance(self.rng.randrange(len(self.plans)))

    def advance(self, index: int) -> None:
        """The next stage runs this plan, unless it is not through with the plan before."""
        plan, done = self.plans[index]
        if not done:
            is_open = any(token < 0 for token in plan.tokens)
            if is_open and plan.number - self.back not in self.results:
                assert any(each.number == plan.number - self.back for each, _ in self.plans[:index]), "open for ever"
                return
            done.append(self.inputs(plan))
        stage = len(done) - 1
        if stage == len(self.ranks) or (index and len(self.plans[index - 1][1]) - 1 <= stage):
            return
        ranks = self.ranks[stage]
        incoming: list[list[tuple[int, list[int]]]] = [[] for _ in ranks]
        for source, target, old, new in zip(
            plan.copy_from, plan.copy_to, plan.copy_sources[stage], plan.copy_targets[stage], strict=True
        ):
            incoming[target].append((new, ranks[source].pool[old][:]))
            self.num_moves += source != target
        for rank, pages in zip(ranks, incoming, strict=True):
            rank.write(plan, done[-1], pages)
        parts = [rank.attend(plan) for rank in self.ranks[stage]]
        positions = [p + 1 for p in self.positions(plan)]
        assert [sum(count for _, count in found) for found in zip(*parts, strict=True)] == positions, "pages unseen"
        done.append([mix(sum(total for total, _ in found), stage) for found in zip(*parts, strict=True)])
        if stage + 1 == len(self.ranks):
            self.results[plan.number] = self.draw(plan, done[-1])

    def inputs(self, plan: Plan) -> list[int]:
        """What goes into the first stage; tokens that were left open are filled in."""
        self.num_filled += sum(token < 0 for token in plan.tokens)
        found = self.results.get(plan.number - self.back, array("i"))
        tokens = [found[-1 - token] if token < 0 else token for token in plan.tokens]
        return [mix(token, position) for token, position in zip(tokens, self.positions(plan), strict=True)]

    def draw(self, plan: Plan, hidden: list[int]) -> array[int]:
        for admit in plan.admits:
            self.samplers[admit.slot] = admit.params.seed or 0, admit.sample_index
        entries = zip(plan.sample_row, plan.sample_slot, plan.sample_position, strict=True)
        return array("i", (draw(hidden[row], *self.samplers[slot], position) for row, slot, position in entries))

    @staticmethod
    def positions(plan: Plan) -> list[int]:
        rows = zip(plan.first_position, plan.query_start, plan.query_start[1:], strict=False)
        return [position for first, start, end in rows for position in range(first, first + end - start)]

    def finish(self) -> StepResult:
        for _ in self.ranks:
            self.advance(0)
        plan, _ = self.plans.pop(0)
        self.results.pop(plan.number - self.back, None)
        return StepResult(plan.number, self.results[plan.number])

    def run(self, plan: Plan) -> StepResult:
        self.submit(plan)
        return self.finish()


class WatchedAllocator(BlockAllocator):
    """Scribbles over each block that it hands out, and remembers the generations that it gave."""

    def __init__(self, device_id: int, rank: Rank, rng: random.Random) -> None:
        super().__init__(DeviceId(device_id), len(rank.pool))
        self.rank, self.rng = rank, rng
        self.lives: dict[int, int] = {}
        self.stale: list[PageRef] = []

    def allocate(self, count: int = 1, near: int = -1) -> list[PageRef]:
        refs = super().allocate(count, BlockId(near))
        for ref in refs:
            block, generation = block_of(ref), generation_of(ref)
            assert generation == self.lives.get(block, 0) + 1, "the generation did not grow by one"
            if block in self.lives:
                self.stale.append(PageRef(ref - 1))
            self.lives[block] = generation
            self.rank.pool[block] = [mix(block, offset, 77) for offset in range(self.rank.block_size)]
        return refs

    def probe_stale(self) -> None:
        """An old reference must be refused by every call, with nothing changed."""
        if self.stale:
            ref = self.rng.choice(self.stale)
            for call in (self.share, self.free, self.publish, self.pin):
                try:
                    call(ref)
                except StalePage:
                    continue
                raise AssertionError("a stale reference was taken")


@dataclass
class Stream:
    request: Request
    reference: Reference
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    cancelled: bool = False


class WatchedScheduler(ShardScheduler):
    """Asserts the promises on preemption at the moment of each."""

    failed = False  # pages that never came are given up by whoever took them over

    def abandon(self, why: str) -> list[TokenOutput]:
        self.failed = True
        outputs = super().abandon(why)
        self.failed = False
        return outputs

    def _preempt(self, sequence: Sequence) -> None:
        assert self.failed or sequence is not self._oldest(), "the oldest sequence was preempted"
        younger = [s for s in self.running if s.order > sequence.order]
        assert self.failed or not younger, "a sequence was preempted while a younger one runs"
        super()._preempt(sequence)
        assert self.failed or sequence.preemptions <= self.config.max_preemptions, "preempted too often"


class Simulation:
    """Random arrivals, cancels, forks and retirements from one seed; `check` after every step.

    Args:
        knobs: overrides of ShardConfig; the rest is drawn.
        depth: stages in the configuration, and plans in flight where none is made ahead; so many stages, or one less.
        groups: of each stage.
    """

    def __init__(
        self, seed: int, depth: int | None = None, groups: int | None = None, **knobs: int | float | bool
    ) -> None:
        self.rng = rng = random.Random(seed)
        block_size = int(knobs.pop("block_size", rng.choice([1, 2, 3, 4, 8])))
        num_blocks = int(knobs.pop("num_blocks", rng.choice([6, 12, 24, 40])))
        settings: dict[str, int | float | bool] = {
            "max_model_len": min(60, num_blocks * block_size),
            "max_num_seqs": rng.choice([1, 3, 8]),
            "max_num_partial_prefills": rng.choice([1, 2, 4]),
            "enable_prefix_caching": rng.random() < 0.8,
            "max_waiting": 12,
            "max_pool_share": rng.choice([0.3, 0.5, 1.0]),
            "max_preemptions": rng.choice([1, 3]),
        }
        settings["max_num_batched_tokens"] = int(settings["max_num_seqs"]) + block_size + rng.choice([0, 5, 30])
        settings.update(knobs)
        self.depth = depth or rng.choice([1, 2, 3])
        settings["num_stages"] = self.depth
        settings.setdefault("async_scheduling", rng.random() < 0.6)
        self.config = ShardConfig(num_blocks=num_blocks, block_size=block_size, **settings)  # type: ignore[arg-type]
        self.num_stages = max(1, self.depth - rng.choice([0, 0, 1]))
        sizes = self.draw_sizes(num_blocks, groups or rng.choice([1, 1, 2, 4]))
        self.device = FakeDevice(sizes, block_size, self.depth, rng)
        columns = [
            [WatchedAllocator(3 + stage * len(ranks) + group, rank, rng) for group, rank in enumerate(ranks)]
            for stage, ranks in enumerate(self.device.ranks)
        ]
        self.allocators = [allocator for column in columns for allocator in column]
        self.pool = PagePool(columns)
        self.scheduler = WatchedScheduler(self.config, self.pool, b"simulated")
        self.streams: dict[tuple[str, int], Stream] = {}
        self.families = [[rng.randrange(1, VOCAB) for _ in range(60)] for _ in range(3)]
        self.names = 0
        self.num_tokens = 0
        self.num_refused = 0
        self.steps = 0

    def draw_sizes(self, num_blocks: int, num_groups: int) -> list[list[int]]:
        """Blocks by stage and group: the groups hold `num_blocks` pages, about evenly or not at all; of each group one
        stage has just enough."""
        rng = self.rng
        even = rng.random() < 0.5
        smallest = [num_blocks // num_groups] * num_groups if even else [1] * num_groups
        while sum(smallest) < num_blocks:
            smallest[rng.randrange(num_groups)] += 1
        sizes = [[least + rng.choice([0, 0, 1, 5]) for least in smallest] for _ in range(self.num_stages)]
        for group, least in enumerate(smallest):
            sizes[rng.randrange(self.num_stages)][group] = least
        return sizes

    def step(self) -> None:
        """One random event, then plans and retirements, then all invariants."""
        self.steps += 1
        roll = self.rng.random()
        if roll < 0.30:
            self.arrive()
        elif roll < 0.36:
            self.cancel()
        elif roll < 0.42:
            self.fork()
        elif roll < 0.45:
            self.resume()
        self.advance()
        self.check()

    def advance(self) -> bool:
        """Schedule up to the depth, then retire some; whether anything moved."""
        moved = False
        while self.scheduler.num_in_flight < self.config.max_in_flight:
            oldest = self.scheduler._oldest()
            awaits = oldest is not None and oldest.pending and not self.may_step_ahead(oldest)
            plan = self.scheduler.schedule()
            if plan is None:
                assert self.scheduler.num_in_flight or not self.scheduler.has_work, "work, room and no plan"
                break
            assert oldest is not None
            held = self.scheduler.num_in_flight > 1 and self.pool.num_retiring > 0
            assert awaits or held or oldest.last_plan == plan.number, "the oldest sequence did not advance"
            moved = True
            self.device.submit(plan)
            if self.rng.random() < 0.3:
                break
        if self.scheduler.num_in_flight and (not moved or self.rng.random() < 0.7):
            moved = True
            for output in self.scheduler.retire(self.device.finish()):
                self.receive(output)
        return moved

    def may_step_ahead(self, sequence: Sequence) -> bool:
        """Whether the next plan may take a sequence that awaits one token."""
        may = sequence.state is State.DECODE and sequence.pending == 1 and sequence.may_step
        is_early = sequence.last_plan > self.scheduler._next_plan - self.depth
        return self.config.async_scheduling and may and not is_early

    def receive(self, output: TokenOutput) -> None:
        stream = self.streams[output.request_id, output.sample_index]
        assert not stream.ended, "an output after the end"
        params = stream.request.params
        if output.token is not None:
            expected = stream.reference.next()
            assert output.token == expected, f"{output}: expected {expected} at step {self.steps}"
            stream.tokens.append(output.token)
            self.num_tokens += 1
        emitted = stream.reference.emitted
        assert params.max_tokens is not None and emitted <= params.max_tokens
        if output.finish_reason is not None:
            stream.ended = True
            stream.cancelled = output.finish_reason is FinishReason.CANCELLED
            if output.finish_reason is FinishReason.LENGTH:
                assert emitted == params.max_tokens
            if output.finish_reason is FinishReason.STOP:
                assert output.token == EOS and emitted >= params.min_tokens
        elif output.token == EOS and not params.ignore_eos:
            assert emitted < params.min_tokens, "went on behind the end"

    def arrive(self) -> None:
        rng = self.rng
        family = rng.choice(self.families)
        prompt = family[: rng.randrange(1, 50)] + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(4))]
        max_tokens = rng.randrange(1, 20)
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 4]),
            seed=rng.randrange(1 << 40),
            max_tokens=max_tokens,
            min_tokens=rng.randrange(max_tokens),
            ignore_eos=rng.random() < 0.3,
        )
        self.names += 1
        request = Request(f"r{self.names}", tuple(prompt), params, (EOS,), rng.choice(["", "", "tenant"]))
        try:
            self.scheduler.add(request)
        except InvalidRequest:
            assert len(prompt) + max_tokens > self.config.max_model_len
            self.num_refused += 1
            return
        except Exception as error:
            assert type(error).__name__ == "Overloaded" and len(self.scheduler.waiting) >= self.config.max_waiting
            self.num_refused += 1
            return
        for index in range(params.n):
            self.begin(request, index)

    def begin(self, request: Request, index: int, emitted: tuple[int, ...] = ()) -> None:
        """What comes for this sample from here on is compared with the reference."""
        reference = Reference(request, index, emitted, self.num_stages)
        self.streams[request.request_id, index] = Stream(request, reference, list(emitted))

    def cancel(self) -> None:
        sequences = self.scheduler.sequences()
        if not sequences:
            return
        victim = self.rng.choice(sequences)
        request_id = victim.request.request_id
        if self.rng.random() < 0.5:
            outputs = self.scheduler.cancel(request_id)
        else:
            outputs = [self.scheduler.finish(request_id, victim.sample_index, FinishReason.CANCELLED)]
        for output in outputs:
            self.receive(output)

    def fork(self) -> None:
        running = [s for s in self.scheduler.sequences() if s.state is not State.FORK]
        if not running:
            return
        parent = self.rng.choice(running)
        emitted = tuple(parent.tokens[parent.prompt_length :])
        if self.rng.random() < 0.5:  # from an earlier output, as a front does that has not seen the last ones
            emitted = emitted[: self.rng.randrange(len(emitted) + 1)]
        room = self.config.max_model_len - parent.prompt_length
        if len(emitted) + 1 > room:
            return
        params = SamplingParams(
            seed=self.rng.randrange(1 << 40), max_tokens=self.rng.randrange(len(emitted) + 1, room + 1)
        )
        self.names += 1
        request = Request(f"f{self.names}", parent.request.prompt, params, (EOS,), parent.request.cache_salt)
        try:
            self.scheduler.fork(parent.request.request_id, parent.sample_index, request, len(emitted))
        except Exception as error:
            assert type(error).__name__ == "Overloaded"
            return
        self.begin(request, 0, emitted)

    def resume(self) -> None:
        """A request ends here and goes on under another name from what it has emitted, as after a shard's death."""
        sequences = self.scheduler.sequences()
        if not sequences:
            return
        old = self.rng.choice(sequences).request
        for output in self.scheduler.cancel(old.request_id):
            self.receive(output)
        left = {
            index: tuple(stream.tokens)
            for (name, index), stream in self.streams.items()
            if name == old.request_id and stream.cancelled
        }
        self.names += 1
        request = Request(f"m{self.names}", old.prompt, old.params, old.eos_token_ids, old.cache_salt)
        try:
            self.scheduler.add(request, {index: array("i", tokens) for index, tokens in left.items()})
        except Exception as error:
            assert type(error).__name__ == "Overloaded"
            return
        for index, tokens in left.items():
            self.begin(request, index, tokens)

    def check(self) -> None:
        self.scheduler.check()
        self.rng.choice(self.allocators).probe_stale()
        unfinished = {(s.request.request_id, s.sample_index) for s in self.scheduler.sequences()}
        assert unfinished == {key for key, stream in self.streams.items() if not stream.ended}, "a sequence got lost"
        for sequence in self.scheduler.sequences():
            self.check_chain(sequence)

    def check_chain(self, sequence: Sequence) -> None:
        """Sealed pages of a table stand in the tree under the digest of exactly this sequence's tokens (D8, D9)."""
        size, salt = self.config.block_size, sequence.request.cache_salt
        digest = sha256(
            b"quire root\0" + len(b"simulated").to_bytes(8, "little") + b"simulated" + salt.encode()
        ).digest()
        for index, page in enumerate(list(sequence.table)[: sequence.num_sealed]):
            digest = sha256(digest + array("i", sequence.tokens[index * size : (index + 1) * size]).tobytes()).digest()
            assert self.pool.tree.digest(page) == digest, "a page is found under another content's digest"
            behind = list(islice(self.pool.tree.path(page), 1, 2))
            assert behind == [LogicalPageId(p) for p in sequence.table.pages[max(0, index - 1) : index]]

    def drain(self, limit: int = 3000) -> None:
        """No more events: everything ends, and the pool is empty (D25, D26)."""
        for _ in range(limit):
            if not self.scheduler.has_work and not self.scheduler.num_in_flight:
                break
            self.advance()
            self.check()
        assert not self.scheduler.has_work, "did not finish"
        assert all(stream.ended for stream in self.streams.values())
        self.pool.flush()
        self.scheduler.check()
        assert self.pool.num_free == self.pool.num_pages == self.config.num_blocks, "pages were lost"
        assert self.pool.attended == [0] * self.pool.num_groups
        for allocator in self.allocators:
            assert allocator.num_free == allocator.num_blocks, "blocks were lost"
            assert allocator.num_allocations == allocator.num_frees
        assert self.pool.num_retiring == 0
