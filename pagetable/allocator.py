"""One device's blocks: which are free, who uses the others, and when they may be used again.

    allocate -> RESERVED -- publish --> LIVE -- last user frees --> CACHED (kept) or FREE
                                         ^------- share ------------'

Free blocks are kept in chunks of RUN consecutive ids. A table that grows takes the block behind its last one;
a new table starts a chunk that nobody uses, while there is one. So tables become runs of consecutive blocks (which
kernels read faster and transfers move in one piece) without any block being set aside: when only used chunks
have room left, their blocks are taken like any other.

Free in plan order: a plan in flight may still read or write a block that its last user has given up. `free` says
which plan named it last; the block keeps its state until `retire` of that plan, and a new user may still share it
meanwhile.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from enum import IntEnum

from pagetable.errors import InvariantBroken, OutOfBlocks, StalePage, WrongState
from pagetable.ids import (
    MAX_BLOCKS,
    MAX_DEVICES,
    MAX_GENERATIONS,
    BlockId,
    DeviceId,
    PageRef,
    PlanNumber,
    block_of,
    device_of,
)

RUN = 8
_WHOLE = (1 << RUN) - 1
NO_BLOCK = BlockId(-1)
NO_PLAN = PlanNumber(0)


class BlockState(IntEnum):
    FREE = 0
    RESERVED = 1  # a plan or a fetch will fill it
    LIVE = 2
    CACHED = 3  # no user; found by the prefix tree
    QUARANTINED = 4  # an aborted transfer may still write to it
    BAD = 5


class BlockAllocator:
    """Blocks of one KV device. Every call is O(1) per block and checks its reference's generation.

    A call that raises has changed nothing. Plans are numbered from 1.
    """

    def __init__(self, device_id: DeviceId, num_blocks: int) -> None:
        if not 1 <= num_blocks <= MAX_BLOCKS:
            raise ValueError(f"num_blocks: got {num_blocks}, must be from 1 to {MAX_BLOCKS}")
        if not 0 <= device_id < MAX_DEVICES:
            raise ValueError(f"device_id: got {device_id}, must be from 0 to {MAX_DEVICES - 1}")
        self.device_id = device_id
        self.num_blocks = num_blocks
        self.counts = [num_blocks, 0, 0, 0, 0, 0]  # by state
        self.num_allocations = 0
        self.num_frees = 0
        self._state = bytearray(num_blocks)
        self._users = array("I", bytes(4 * num_blocks))
        self._pins = array("I", bytes(4 * num_blocks))
        self._generation = array("I", bytes(4 * num_blocks))
        self._keep = bytearray(num_blocks)
        self._busy = array("Q", bytes(8 * num_blocks))  # the last plan that names the block, as far as `free` was told
        self._retired = NO_PLAN
        self._retiring: dict[PlanNumber, dict[BlockId, None]] = {}  # unused blocks by the plan they wait for
        chunks = -(-num_blocks // RUN)
        self._room = bytearray([_WHOLE]) * chunks  # a bit per free block of the chunk
        self._whole: OrderedDict[int, None] = OrderedDict.fromkeys(range(chunks))
        self._partial: OrderedDict[int, None] = OrderedDict()
        if num_blocks % RUN:
            self._room[-1] = (1 << num_blocks % RUN) - 1
            del self._whole[chunks - 1]
            self._partial[chunks - 1] = None

    @property
    def num_free(self) -> int:
        return self.counts[BlockState.FREE]

    @property
    def num_retiring(self) -> int:
        """Unused blocks that wait for a plan to retire."""
        return sum(map(len, self._retiring.values()))

    def state(self, block: BlockId) -> BlockState:
        return BlockState(self._state[block])

    def users(self, ref: PageRef) -> int:
        return self._users[self._block(ref)]

    def writable(self, ref: PageRef) -> bool:
        """Whether its one user may write to it: nobody shares it and no prefix tree finds it."""
        block = self._block(ref)
        return self._users[block] == 1 and not self._keep[block]

    def kept(self, ref: PageRef) -> bool:
        """Whether the block is CACHED once nobody uses it."""
        return bool(self._keep[self._block(ref)])

    def allocate(self, count: int = 1, near: BlockId = NO_BLOCK) -> list[PageRef]:
        """Take `count` FREE blocks, RESERVED for one user each; behind `near` and in runs where possible.

        Raises OutOfBlocks where fewer are free.
        """
        if count < 0:
            raise ValueError(f"count: got {count}, must be 0 or more")
        if count > self.counts[BlockState.FREE]:
            raise OutOfBlocks(f"device {self.device_id}: {count} blocks needed, {self.num_free} free")
        refs = []
        for _ in range(count):
            near = self._take(near)
            self._move(near, BlockState.RESERVED)
            self._users[near] = 1
            self._generation[near] = generation = (self._generation[near] + 1) % MAX_GENERATIONS
            refs.append(PageRef(self.device_id << 48 | near << 24 | generation))
        self.num_allocations += count
        return refs

    def publish(self, ref: PageRef) -> None:
        """RESERVED -> LIVE: the plan that fills it has retired."""
        block = self._in_state(ref, BlockState.RESERVED)
        self._move(block, BlockState.LIVE)

    def share(self, ref: PageRef) -> None:
        """One more user; a CACHED block is LIVE again."""
        block = self._in_state(ref, BlockState.RESERVED, BlockState.LIVE, BlockState.CACHED)
        self._users[block] += 1
        if self._state[block] == BlockState.CACHED:
            self._move(block, BlockState.LIVE)
        elif self._users[block] == 1:
            self._retiring.get(PlanNumber(self._busy[block]), {}).pop(block, None)

    def free(self, ref: PageRef, after: PlanNumber = NO_PLAN) -> BlockState:
        """One user less. The last one leaves the block FREE, or CACHED where it is kept, once plan `after` has retired.

        Returns the state that the block has now.
        """
        block = self._block(ref)
        if not self._users[block]:
            raise WrongState(f"block {block} of device {self.device_id} has no user to free it")
        self._users[block] -= 1
        if after > self._busy[block]:
            self._busy[block] = after
        if not self._users[block] and self._state[block] in _HELD:
            self._let_go(block)
        return BlockState(self._state[block])

    def retire(self, plan: PlanNumber) -> list[PageRef]:
        """Plan `plan` and all before it are over on every rank. Returns the references whose blocks came to rest."""
        if plan < self._retired:
            raise WrongState(f"plan {plan} retires after plan {self._retired}")
        self._retired = plan
        rested = []
        # by number: what hangs on a page waits for no later plan than the page, and must rest before it
        for number in sorted(n for n in self._retiring if n <= plan):
            for block in self._retiring.pop(number):
                self._rest(block)
                if self._state[block] not in _HELD:  # a pin may hold it still
                    rested.append(self._ref(block))
        return rested

    def keep(self, ref: PageRef, kept: bool) -> None:
        """Whether the block is CACHED rather than FREE once nobody uses it. Dropping it frees a CACHED block."""
        block = self._block(ref)
        if not kept and self._pins[block] and self._state[block] == BlockState.CACHED:
            raise WrongState(f"block {block} of device {self.device_id} is pinned")
        self._keep[block] = kept
        if not kept and self._state[block] == BlockState.CACHED:
            self._release(block)

    def pin(self, ref: PageRef) -> None:
        """A transfer or a foreign reader works on it: neither evicted nor freed until `unpin`."""
        self._pins[self._block(ref)] += 1

    def unpin(self, ref: PageRef) -> None:
        block = self._block(ref)
        if not self._pins[block]:
            raise WrongState(f"block {block} of device {self.device_id} is not pinned")
        self._pins[block] -= 1
        if not self._pins[block] and not self._users[block] and self._state[block] in _HELD:
            self._let_go(block)

    def quarantine(self, ref: PageRef) -> None:
        """RESERVED -> QUARANTINED: the transfer that fills it was aborted and may still write."""
        block = self._in_state(ref, BlockState.RESERVED)
        self._retiring.get(PlanNumber(self._busy[block]), {}).pop(block, None)
        self._move(block, BlockState.QUARANTINED)

    def release(self, ref: PageRef) -> None:
        """QUARANTINED -> FREE: nothing writes to it any more."""
        block = self._in_state(ref, BlockState.QUARANTINED)
        self._users[block] = self._pins[block] = 0
        self._release(block)

    def condemn(self, ref: PageRef) -> None:
        """-> BAD, for ever: the memory under an unused, unpinned or quarantined block failed."""
        block = self._in_state(ref, BlockState.CACHED, BlockState.QUARANTINED)
        if self._pins[block] and self._state[block] == BlockState.CACHED:
            raise WrongState(f"block {block} of device {self.device_id} is pinned")
        self._users[block] = self._pins[block] = self._keep[block] = 0
        self._move(block, BlockState.BAD)

    def check(self) -> None:
        """Recount everything from scratch (RELIABILITY D1, D2, D4); InvariantBroken says what disagrees."""

        def require(holds: bool, what: str) -> None:
            if not holds:
                raise InvariantBroken(f"device {self.device_id}: {what}")

        require(self.counts == [self._state.count(s) for s in BlockState], "counts differ from a recount")
        require(sum(self.counts) == self.num_blocks, "states do not sum to the number of blocks")
        free = {b for b in range(self.num_blocks) if self._state[b] == BlockState.FREE}
        listed = {c * RUN + i for c in (*self._whole, *self._partial) for i in range(RUN) if self._room[c] >> i & 1}
        require(free == listed, "the free lists differ from the states")
        require(all(self._room[c] == _WHOLE for c in self._whole), "a used chunk is listed as whole")
        require(all(0 < self._room[c] < _WHOLE for c in self._partial), "an empty or whole chunk is listed as partial")
        require(not any(self._users[b] or self._pins[b] or self._keep[b] for b in free), "a free block is in use")
        waiting = {b for blocks in self._retiring.values() for b in blocks}
        for b in range(self.num_blocks):
            state = self._state[b]
            if state == BlockState.CACHED:
                require(self._users[b] == 0 and self._keep[b] == 1, f"cached block {b} has users or no keeper")
            elif state in _HELD and not self._users[b]:
                require(b in waiting or self._pins[b] > 0, f"block {b} has no user and waits for nothing: a leak")
        used = self.num_blocks - self.num_free
        require(self.num_allocations - self.num_frees == used, "allocations less frees differ from the blocks in use")

    def _ref(self, block: BlockId) -> PageRef:
        return PageRef(self.device_id << 48 | block << 24 | self._generation[block])

    def _block(self, ref: PageRef) -> BlockId:
        block = block_of(ref)
        if ref >> 48 != self.device_id or block >= self.num_blocks:
            raise StalePage(f"({device_of(ref)}, {block}) is no block of device {self.device_id}")
        if ref % MAX_GENERATIONS != self._generation[block] or not self._state[block]:  # 0 is FREE
            raise StalePage(f"block {block} of device {self.device_id} has begun another life")
        return block

    def _in_state(self, ref: PageRef, *states: BlockState) -> BlockId:
        block = self._block(ref)
        if self._state[block] not in states:
            wanted = " or ".join(s.name for s in states)
            raise WrongState(f"block {block} of device {self.device_id} is {self.state(block).name}, not {wanted}")
        return block

    def _move(self, block: BlockId, state: BlockState) -> None:
        self.counts[self._state[block]] -= 1
        self.counts[state] += 1
        self._state[block] = state

    def _let_go(self, block: BlockId) -> None:
        if self._busy[block] > self._retired:
            self._retiring.setdefault(PlanNumber(self._busy[block]), {})[block] = None
        else:
            self._rest(block)

    def _rest(self, block: BlockId) -> None:
        if self._keep[block]:
            self._move(block, BlockState.CACHED)
        elif not self._pins[block]:
            self._release(block)

    def _release(self, block: BlockId) -> None:
        self._move(block, BlockState.FREE)
        self._keep[block] = 0
        self._busy[block] = 0
        self.num_frees += 1
        chunk = block // RUN
        room = self._room[chunk]
        self._room[chunk] = room | 1 << block % RUN
        if self._room[chunk] == _WHOLE:
            self._partial.pop(chunk, None)
            self._whole[chunk] = None
        elif not room:
            self._partial[chunk] = None

    def _take(self, near: BlockId) -> BlockId:
        """Remove one block from the free lists: behind `near`, else the start of a whole chunk, else any."""
        follower = near + 1
        if near >= 0 and follower < self.num_blocks:
            room = self._room[follower // RUN]
            fits = room == _WHOLE if follower % RUN == 0 else room >> follower % RUN & 1
            if fits:
                return self._remove(BlockId(follower))
        if self._whole:
            return self._remove(BlockId(next(iter(self._whole)) * RUN))
        chunk = next(iter(self._partial))
        room = self._room[chunk]
        return self._remove(BlockId(chunk * RUN + (room & -room).bit_length() - 1))

    def _remove(self, block: BlockId) -> BlockId:
        chunk = block // RUN
        room = self._room[chunk]
        left = room & ~(1 << block % RUN)
        self._room[chunk] = left
        if room == _WHOLE:
            del self._whole[chunk]
            if left:
                self._partial[chunk] = None
        elif not left:
            del self._partial[chunk]
        return block


_HELD = (BlockState.RESERVED, BlockState.LIVE)
