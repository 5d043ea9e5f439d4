"""A shard over its real socket: tokens equal to the engine's, pages that come back, and peers that mean no good."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import worker.server
from cluster.view import ShardView
from cluster.wire import Link
from launch.llm import LLM
from pagetable.frames import Kind, encode_frame, prove
from pagetable.sampling import Limits, SamplingParams, admit_request, encode_params
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.models import make_model
from worker.config import ShardConfig
from worker.model_config import ModelConfig
from worker.server import ShardServer
from worker.shard import build_loop

SECRET = bytes(range(32))
PATIENCE = 60.0
VOCAB = 331
BLOCK_BYTES = 2 * 2 * 4 * 8 * 32 * 4  # K and V, layers, kv heads, tokens, head_dim, float32
SHARD = {"num_blocks": 96, "block_size": 8, "max_model_len": 512, "max_num_seqs": 12, "max_num_batched_tokens": 128}
LIMITS = Limits(VOCAB, 512, 96 * 8)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, seed=1)
# long enough to be still running when the test gets to it
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, seed=1)


def drawn(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", seed=3)


@pytest.fixture(scope="module")
def engine(folder: Path) -> LLM:
    return LLM(
        str(folder),
        block_size=8,
        num_gpu_blocks_override=96,
        max_model_len=512,
        max_num_seqs=12,
        max_num_batched_tokens=128,
    )


def spawn(folder: Path, **changes: Any) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`python -m worker`; the process, and the last thing that it said before it served or failed."""
    settings = {
        "folder": str(folder),
        "model": "toy",
        "shard": SHARD,
        "dtype": "float32",
        "device_id": 4,
        "shard_id": 2,
        "epoch": 77,
        "threads": 1,
        "host": "127.0.0.1",
        "port": 0,
        "secret": SECRET.hex(),
    }
    command = [sys.executable, "-m", "worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(settings | changes) + "\n")
    process.stdin.flush()
    said: dict[str, Any] = {}
    for line in process.stdout:
        said = json.loads(line)
        if "loading" not in said:
            break
    return process, said


@pytest.fixture(scope="module")
def shard(folder: Path) -> Iterator[pb.ShardInfo]:
    """One process for all tests of this file: none may leave it the worse."""
    process, said = spawn(folder)
    info = pb.ShardInfo.FromString(bytes.fromhex(said["ready"]))
    assert info.pid == process.pid
    yield info
    assert process.poll() is None, "the shard has died"
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(PATIENCE) == 0


@dataclass
class Sample:
    tokens: list[int] = field(default_factory=list)
    finish: int = 0
    last: pb.Delta = field(default_factory=pb.Delta)


class Front:
    """A front's connection: submits, and collects what comes by (handle, sample)."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.info = pb.ShardInfo()
        self.samples: dict[tuple[int, int], Sample] = {}
        self.refused: dict[int, pb.Refused] = {}
        self.begun: list[int] = []
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def dial(cls, info: pb.ShardInfo) -> Front:
        front = cls(await Link.connect(info.address, pb.ROLE_FRONT, "front", SECRET))
        await front.until(lambda: bool(front.info.address))
        return front

    async def _read(self) -> None:
        async for kind, payload in self.link.frames():
            if kind is Kind.WELCOME:
                self.info = pb.Welcome.FromString(payload).shard
            elif kind is Kind.REFUSED:
                refused = pb.Refused.FromString(payload)
                self.refused[refused.handle] = refused
            elif kind is Kind.BEGUN:
                for handle in pb.Begun.FromString(payload).handles:
                    assert handle not in self.begun, "begun twice"
                    self.begun.append(handle)
            else:
                assert kind is Kind.TOKENS
                for delta in pb.Tokens.FromString(payload).deltas:
                    assert delta.handle in self.begun or not delta.HasField("token"), "a step before its announcement"
                    sample = self.samples.setdefault((delta.handle, delta.sample), Sample())
                    assert not sample.finish, "something behind the end"
                    if delta.HasField("token"):
                        sample.tokens.append(delta.token)
                    sample.finish, sample.last = delta.finish, delta
            self._news.set()
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not holds():
                assert not self._reader.done(), f"the connection ended: {self.link.why}"
                self._news.clear()
                await self._news.wait()

    def submit(self, handle: int, prompt: Sequence[int], params: SamplingParams, **fields: Any) -> None:
        self.link.send(Kind.SUBMIT, self.request(handle, prompt, params, **fields))

    def request(self, handle: int, prompt: Sequence[int], params: SamplingParams, **fields: Any) -> pb.Submit:
        admitted = admit_request("r", prompt, params, LIMITS, seed=5)
        return pb.Submit(
            handle=handle,
            request_id=f"user-{handle}",
            owner="tenant",
            prompt=array("i", admitted.prompt).tobytes(),
            params=encode_params(admitted.params),
            eos_token_ids=array("i", [1]).tobytes(),
            **fields,
        )

    def tokens(self, handle: int, sample: int = 0) -> list[int]:
        return self.samples[handle, sample].tokens if (handle, sample) in self.samples else []

    async def ended(self, handle: int, sample: int = 0) -> Sample:
        await self.until(lambda: (handle, sample) in self.samples and self.samples[handle, sample].finish > 0)
        return self.samples[handle, sample]

    async def close(self) -> None:
        self.link.close()
        await self._reader


class Listener:
    """The scheduler's connection: a view of the shard."""

    def __init__(self, link: Link) -> None:
        self.link, self.view = link, ShardView(77)
        self.owners: set[tuple[str, str]] = set()
        self.most_shared = 0
        self._frames = link.frames()

    @classmethod
    async def dial(cls, info: pb.ShardInfo) -> Listener:
        return cls(await Link.connect(info.address, pb.ROLE_SCHEDULER, "scheduler", SECRET))

    async def until(self, holds: Callable[[ShardView], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not (self.view.number and holds(self.view)):
                kind, payload = await anext(self._frames)
                if kind is Kind.EVENTS:
                    events = pb.Events.FromString(payload)
                    assert events.epoch == 77
                    self.view.apply(events)
                    self.look()

    def look(self) -> None:
        users: dict[int, int] = {}
        for sequence in self.view.sequences.values():
            self.owners.add((sequence.request_id, sequence.owner))
            for entry in sequence.entries:
                users[entry] = users.get(entry, 0) + 1
        self.most_shared = max([self.most_shared, *users.values()])
        assert self.view.load.used_blocks >= len(users), "a table names a block that is not in use"

    async def pong(self, number: int) -> pb.Pong:
        self.link.send(Kind.PING, pb.Ping(number=number))
        async with asyncio.timeout(PATIENCE):
            while True:
                kind, payload = await anext(self._frames)
                if kind is Kind.PONG:
                    return pb.Pong.FromString(payload)
                if kind is Kind.EVENTS:
                    self.view.apply(pb.Events.FromString(payload))


def at_rest(view: ShardView) -> bool:
    load = view.load
    settled = load.free_blocks + load.cached_blocks == SHARD["num_blocks"] and load.used_blocks == 0
    return settled and not view.sequences and load.running == load.waiting == 0


def on(info: pb.ShardInfo, body: Callable[[Front], Awaitable[None]]) -> None:
    """Run a test with a front; afterwards every page of the shard is back and it answers as before."""

    async def run() -> None:
        async with asyncio.timeout(3 * PATIENCE):
            front = await Front.dial(info)
            await body(front)
            if front.link.is_open:
                await front.close()
            canary = await Front.dial(info)
            canary.submit(1, drawn(1, 30), GREEDY)
            assert (await canary.ended(1)).tokens == CANARY.setdefault(info.address, canary.tokens(1))
            await canary.close()
            listener = await Listener.dial(info)
            await listener.until(at_rest)
            listener.link.close()
            os.kill(info.pid, 0)

    asyncio.run(run())


CANARY: dict[str, list[int]] = {}


def expected(engine: LLM, prompt: Sequence[int], params: SamplingParams) -> list[list[int]]:
    (output,) = engine.generate([list(prompt)], params)
    return [list(sample.token_ids) for sample in output.outputs]


def test_the_shard_says_what_it_is(shard: pb.ShardInfo) -> None:
    async def body(front: Front) -> None:
        info = front.info
        assert info == shard
        assert (info.shard_id, info.epoch, list(info.device_ids), info.model) == (2, 77, [4], "toy")
        assert (info.block_size, info.num_blocks, info.max_model_len, info.vocab_size) == (8, 96, 512, VOCAB)
        assert array("i", info.eos_token_ids).tolist() == [1] and len(info.identity) == 32
        assert list(info.block_bytes) == [BLOCK_BYTES]

    on(shard, body)


def test_tokens_are_the_engines_own(shard: pb.ShardInfo, engine: LLM) -> None:
    cases = [
        (drawn(11, 40), GREEDY),
        (drawn(11, 40)[:24] + drawn(12, 60), SamplingParams(temperature=0.8, seed=7, max_tokens=30, n=3)),
        (drawn(13, 1), SamplingParams(temperature=1.0, top_p=0.9, seed=9, max_tokens=12)),
        (drawn(14, 200), SamplingParams(temperature=0.0, seed=1, max_tokens=9, logprobs=2, ignore_eos=True)),
        (drawn(15, 17), SamplingParams(temperature=0.7, top_k=20, seed=3, max_tokens=40, min_tokens=5)),
    ]

    async def body(front: Front) -> None:
        for handle, (prompt, params) in enumerate(cases, 1):
            front.submit(handle, prompt, params)
        for handle, (prompt, params) in enumerate(cases, 1):
            wanted = expected(engine, prompt, params)
            found = [(await front.ended(handle, index)).tokens for index in range(params.n)]
            assert found == wanted, f"case {handle}"
        last = front.samples[4, 0].last
        assert last.finish == pb.FINISH_REASON_LENGTH and len(last.logprobs.top_tokens) == 2
        assert len(last.page_blocks) == len(last.page_devices) == 26 and set(last.page_devices) == {4}

    on(shard, body)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.9, seed=21, max_tokens=20, ignore_eos=True)])
def test_a_request_goes_on_from_what_it_has_emitted(shard: pb.ShardInfo, engine: LLM, params: SamplingParams) -> None:
    prompt = drawn(30, 50)
    (whole,) = expected(engine, prompt, params)

    async def body(front: Front) -> None:
        for handle, seen in enumerate((0, 1, 7, 19), 1):
            samples = [pb.Resumed(sample=0, outputs=array("i", whole[:seen]).tobytes())]
            front.submit(handle, prompt, params, samples=samples)
        for handle, seen in enumerate((0, 1, 7, 19), 1):
            assert (await front.ended(handle)).tokens == whole[seen:]

    on(shard, body)


def test_only_the_samples_that_are_named_go_on(shard: pb.ShardInfo, engine: LLM) -> None:
    prompt, params = drawn(31, 33), SamplingParams(temperature=0.9, seed=4, max_tokens=15, n=4, ignore_eos=True)
    whole = expected(engine, prompt, params)

    async def body(front: Front) -> None:
        samples = [
            pb.Resumed(sample=i, outputs=array("i", whole[i][:count]).tobytes()) for i, count in ((1, 6), (3, 0))
        ]
        front.submit(1, prompt, params, samples=samples)
        assert (await front.ended(1, 1)).tokens == whole[1][6:]
        assert (await front.ended(1, 3)).tokens == whole[3]
        assert sorted(front.samples) == [(1, 1), (1, 3)]

    on(shard, body)


def test_a_fork_goes_on_from_the_outputs_that_the_front_has_seen(shard: pb.ShardInfo, engine: LLM) -> None:
    prompt = drawn(32, 44)
    child = SamplingParams(temperature=0.9, seed=99, max_tokens=40, ignore_eos=True)

    async def body(front: Front) -> None:
        listener = await Listener.dial(shard)
        front.submit(1, prompt, LONG)
        await front.until(lambda: len(front.tokens(1)) >= 16)  # its page of the tenth output is full and sealed
        seen = front.tokens(1)[:10]
        fork = pb.Fork(handle=2, parent_handle=1, num_outputs=10, request=front.request(2, prompt, child))
        front.link.send(Kind.FORK, fork)
        forked = (await front.ended(2)).tokens
        await listener.until(lambda view: ("user-2", "tenant") in listener.owners)
        assert listener.most_shared == 2, "the fork shares no page with its parent"
        front.link.send(Kind.CANCEL, pb.Cancel(handle=1))
        await front.ended(1)
        again = [pb.Resumed(sample=0, outputs=array("i", seen).tobytes())]
        front.submit(3, prompt, child, samples=again)
        assert (await front.ended(3)).tokens == forked and len(forked) == 30
        listener.link.close()

    on(shard, body)


def test_cancel_ends_all_samples_and_frees_the_pages(shard: pb.ShardInfo) -> None:
    async def body(front: Front) -> None:
        listener = await Listener.dial(shard)
        front.submit(1, drawn(40, 60), SamplingParams(n=3, temperature=0.5, seed=2, max_tokens=300, ignore_eos=True))
        await front.until(lambda: len(front.tokens(1, 2)) > 3)
        await listener.until(lambda view: len(view.sequences) == 3)
        front.link.send(Kind.CANCEL, pb.Cancel(handle=1))
        for index in range(3):
            assert (await front.ended(1, index)).finish == pb.FINISH_REASON_CANCELLED
        front.link.send(Kind.CANCEL, pb.Cancel(handle=1))  # it has ended: nothing happens
        await listener.until(at_rest)
        listener.link.close()

    on(shard, body)


def test_finish_ends_one_sample(shard: pb.ShardInfo) -> None:
    async def body(front: Front) -> None:
        params = SamplingParams(n=2, temperature=0.5, seed=2, max_tokens=60, ignore_eos=True)
        front.submit(1, drawn(41, 30), params)
        await front.until(lambda: len(front.tokens(1, 1)) > 2)
        front.link.send(Kind.FINISH, pb.Finish(handle=1, sample=1, stop_reason="END"))
        assert (await front.ended(1, 1)).finish == pb.FINISH_REASON_STOP
        front.link.send(Kind.FINISH, pb.Finish(handle=1, sample=1))
        front.link.send(Kind.FINISH, pb.Finish(handle=8, sample=0))
        assert len((await front.ended(1, 0)).tokens) == 60

    on(shard, body)


def test_what_a_vanished_front_asked_for_ends(shard: pb.ShardInfo) -> None:
    async def body(front: Front) -> None:
        for handle in range(1, 30):  # some run, some wait
            front.submit(handle, drawn(handle, 50), LONG)
        await front.until(lambda: len(front.tokens(1)) > 2)
        transport = front.link._transport
        assert transport is not None
        transport.abort()
        await front._reader

    on(shard, body)


def test_what_is_refused_is_refused_alone(shard: pb.ShardInfo) -> None:
    async def body(front: Front) -> None:
        prompt = drawn(50, 20)
        front.submit(1, prompt, LONG)
        good = front.request(2, prompt, GREEDY)
        bad: dict[int, tuple[str, str, pb.Submit]] = {1: ("ALREADY_EXISTS", "", front.request(1, prompt, GREEDY))}

        def add(code: str, field: str, **changes: Any) -> None:
            submit = pb.Submit.FromString(good.SerializeToString())
            submit.handle = len(bad) + 1
            for name, value in changes.items():
                setattr(submit, name, value)
            bad[submit.handle] = code, field, submit

        def params(**changes: Any) -> bytes:
            return json.dumps(json.loads(good.params) | changes).encode()

        add("INVALID_ARGUMENT", "prompt", prompt=array("i", [5, VOCAB]).tobytes())
        add("INVALID_ARGUMENT", "prompt", prompt=array("i", [-1]).tobytes())
        add("INVALID_ARGUMENT", "max_tokens", prompt=b"")
        add("INVALID_ARGUMENT", "max_tokens", prompt=array("i", [5] * 500).tobytes())
        add("INVALID_ARGUMENT", "params", params=b"")
        add("INVALID_ARGUMENT", "params", params=b"\x80\x04N.")
        add("INVALID_ARGUMENT", "params", params=params(surprise=1))
        add("INVALID_ARGUMENT", "n", params=params(n=1 << 40))
        add("INVALID_ARGUMENT", "temperature", params=params(temperature=float("nan")))
        add("INVALID_ARGUMENT", "logit_bias", params=params(logit_bias=[[VOCAB, 1.0]]))
        add("INVALID_ARGUMENT", "max_tokens", params=params(max_tokens=None))
        add("INVALID_ARGUMENT", "max_tokens", params=params(seed=None))
        for name, sample, outputs in (("samples", 1, []), ("outputs", 0, [5] * 20), ("outputs", 0, [VOCAB])):
            add("INVALID_ARGUMENT", name)
            bad[len(bad)][2].samples.add(sample=sample, outputs=array("i", outputs).tobytes())
        for _, _, submit in bad.values():
            front.link.send(Kind.SUBMIT, submit)
        forks = len(bad) + 1
        request = front.request(forks, prompt, GREEDY)
        for offset, (parent, sample, count) in enumerate([(999, 0, 0), (1, 7, 0), (1, 0, 100_000)]):
            fork = pb.Fork(handle=forks + offset, parent_handle=parent, parent_sample=sample, num_outputs=count)
            fork.request.CopyFrom(request)
            front.link.send(Kind.FORK, fork)
        await front.until(lambda: len(front.refused) == len(bad) + 3)
        assert {h: (r.code, r.field) for h, r in front.refused.items() if h < forks} == {
            handle: (code, name) for handle, (code, name, _) in bad.items()
        }
        codes = [front.refused[forks + offset].code for offset in range(3)]
        assert codes == ["NOT_FOUND", "NOT_FOUND", "INVALID_ARGUMENT"]
        assert len((await front.ended(1)).tokens) == 400

    on(shard, body)


def test_the_view_follows_the_shard_and_pings_are_answered_while_it_works(shard: pb.ShardInfo) -> None:
    async def body(front: Front) -> None:
        listener = await Listener.dial(shard)
        idle = await listener.pong(1)
        assert (idle.number, idle.epoch, idle.has_work, idle.step_age_seconds) == (1, 77, False, 0.0)
        for handle in range(1, 21):
            front.submit(
                handle, drawn(7, 40) + drawn(handle, 20), SamplingParams(seed=handle, max_tokens=60, n=1 + handle % 2)
            )
        await front.until(lambda: len(front.tokens(1)) > 2)
        busy = await listener.pong(2)
        assert busy.has_work and busy.steps > idle.steps
        late = await Listener.dial(shard)  # takes over in the middle: a new scheduler
        await late.until(lambda view: late.most_shared > 2)
        for handle in range(1, 21):
            for index in range(1 + handle % 2):
                assert (await front.ended(handle, index)).finish in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
        await late.until(at_rest)
        assert late.view.sealed and late.view.load.output_tokens > 500
        late.link.close()
        listener.link.close()

    on(shard, body)


# Peers that mean no good


def hello(nonce: bytes, role: pb.Role = pb.ROLE_FRONT, secret: bytes = SECRET) -> bytes:
    return encode_frame(
        Kind.HELLO, pb.Hello(role=role, name="x", proof=prove(secret, nonce, role, "x")).SerializeToString()
    )


BAD: dict[str, Callable[[bytes], bytes]] = {
    "random": lambda nonce: random.Random(1).randbytes(4096),
    "pickle": lambda nonce: pickle.dumps({"os": os.getcwd}),
    "length 2**63": lambda nonce: struct.pack("<Q", 1 << 63),
    "length 2**32-1": lambda nonce: b"\xff\xff\xff\xff",
    "length 0": lambda nonce: b"\0\0\0\0",
    "a hello of a megabyte": lambda nonce: struct.pack("<IB", 1 << 20, Kind.HELLO),
    "http": lambda nonce: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown kind": lambda nonce: struct.pack("<IB", 1, 99),
    "no hello first": lambda nonce: encode_frame(Kind.SUBMIT, b""),
    "hello of garbage": lambda nonce: encode_frame(Kind.HELLO, b"\xff\xff\xff"),
    "wrong proof": lambda nonce: hello(nonce, secret=b"x" * 32),
    "a proof for another nonce": lambda nonce: hello(bytes(16)),
    "a role that is none": lambda nonce: hello(nonce, pb.ROLE_UNSPECIFIED),
    "a keeper": lambda nonce: hello(nonce, pb.ROLE_KEEPER),
    "length behind a good hello": lambda nonce: hello(nonce) + struct.pack("<I", 1 << 31),
    "garbage behind a good hello": lambda nonce: hello(nonce) + random.Random(2).randbytes(999),
    "a submit of garbage": lambda nonce: hello(nonce) + encode_frame(Kind.SUBMIT, b"\xff\xff\xff"),
    "a fork of garbage": lambda nonce: hello(nonce) + encode_frame(Kind.FORK, b"\xff\xff\xff"),
    "a cancel of garbage": lambda nonce: hello(nonce) + encode_frame(Kind.CANCEL, b"\xff\xff\xff"),
    "a ping of garbage": lambda nonce: hello(nonce) + encode_frame(Kind.PING, b"\xff\xff\xff"),
    "half an int32": lambda nonce: (
        hello(nonce) + encode_frame(Kind.SUBMIT, pb.Submit(handle=1, prompt=b"abc").SerializeToString())
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_peer_is_cut_off_and_hurts_nobody(name: str, shard: pb.ShardInfo) -> None:
    async def body(front: Front) -> None:
        front.submit(1, drawn(1, 30), LONG)
        await front.until(lambda: len(front.tokens(1)) > 0)
        reader, writer = await asyncio.open_connection(*shard.address.split(":"))
        head = await reader.readexactly(5)
        challenge = pb.Challenge.FromString(await reader.readexactly(struct.unpack("<I", head[:4])[0] - 1))
        writer.write(BAD[name](challenge.nonce))
        try:
            async with asyncio.timeout(PATIENCE):
                while await reader.read(65536):
                    pass
        except ConnectionResetError:  # it was closed with bytes of ours unread
            pass
        writer.close()
        assert len((await front.ended(1)).tokens) == 400

    on(shard, body)


# In this process: what needs small limits


@pytest.fixture
def own(folder: Path) -> Iterator[ShardServer]:
    config = ShardConfig(**SHARD)  # type: ignore[arg-type]
    loop = build_loop(folder, ModelConfig.from_folder(folder), config, "float32", 4)
    info = pb.ShardInfo(shard_id=2, epoch=77, pid=os.getpid(), vocab_size=VOCAB, device_ids=[4])
    for name in ("block_size", "num_blocks", "max_model_len", "max_num_seqs"):
        setattr(info, name, SHARD[name])
    server = ShardServer(loop, info, SECRET)
    server.start("127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_who_does_not_read_is_cut_off_and_others_go_on(own: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.server, "MAX_UNSENT_BYTES", 1 << 16)
    many = SamplingParams(n=4, temperature=0.5, seed=2, max_tokens=400, logprobs=20, ignore_eos=True)

    async def body(front: Front) -> None:
        host, port = own.info.address.split(":")
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            head = deaf.recv(5, socket.MSG_WAITALL)
            nonce = pb.Challenge.FromString(deaf.recv(struct.unpack("<I", head[:4])[0] - 1, socket.MSG_WAITALL)).nonce
            deaf.sendall(hello(nonce))
            for handle in range(1, 9):
                submit = front.request(handle, drawn(handle, 20), many)
                deaf.sendall(encode_frame(Kind.SUBMIT, submit.SerializeToString()))
            front.submit(1, drawn(1, 30), GREEDY)
            assert len((await front.ended(1)).tokens) == 20
            async with asyncio.timeout(PATIENCE):
                while len(own._clients) > 1:  # only the front is left
                    await asyncio.sleep(0.02)

    on(own.info, body)


def test_who_says_nothing_is_cut_off(own: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.server, "HELLO_SECONDS", 0.2)

    async def body(front: Front) -> None:
        reader, writer = await asyncio.open_connection(*own.info.address.split(":"))
        async with asyncio.timeout(PATIENCE):
            assert (await reader.read())[4] == Kind.CHALLENGE
        writer.close()

    on(own.info, body)


def test_who_was_welcomed_in_an_epoch_that_is_over_is_sent_away(own: ShardServer) -> None:
    connection = worker.server.Connection(own, 1 << 40)
    connection.role, connection.epoch = pb.ROLE_FRONT, own.info.epoch - 1
    closed = threading.Event()
    connection.close = closed.set  # type: ignore[method-assign]
    own.post(connection, Kind.HELLO, b"")
    assert closed.wait(PATIENCE)
    assert connection.number not in own._clients


def test_a_step_that_fails_ends_its_requests_and_no_others(own: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run, fail = own.loop.pipe.runner.run, threading.Event()

    def failing(plan: Any) -> Any:
        if fail.is_set():
            fail.clear()
            raise RuntimeError("planted")
        return run(plan)

    monkeypatch.setattr(own.loop.pipe.runner, "run", failing)

    async def body(front: Front) -> None:
        front.submit(1, drawn(1, 30), LONG)
        await front.until(lambda: len(front.tokens(1)) > 2)
        fail.set()
        ended = await front.ended(1)
        assert ended.finish == pb.FINISH_REASON_ERROR and "RuntimeError" in ended.last.failure
        front.submit(2, drawn(1, 30), GREEDY)
        assert (await front.ended(2)).finish == pb.FINISH_REASON_LENGTH

    on(own.info, body)


# The process


@pytest.mark.parametrize("end", ["stdin", "SIGTERM"])
def test_the_process_ends_when_it_is_not_wanted(folder: Path, end: str) -> None:
    process, said = spawn(folder)
    assert "ready" in said and process.stdin is not None
    process.send_signal(signal.SIGINT)  # is for the keeper
    if end == "stdin":
        process.stdin.close()
    else:
        process.terminate()
    assert process.wait(PATIENCE) == 0


def test_a_model_that_is_none_is_said(tmp_path: Path) -> None:
    process, said = spawn(tmp_path)
    assert said["failed"]["code"] == "FAILED_PRECONDITION" and "config.json" in said["failed"]["message"]
    assert process.wait(PATIENCE) == 1


def test_a_port_that_is_taken_is_said(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process, said = spawn(folder, port=taken.getsockname()[1])
    assert said["failed"]["code"] == "UNAVAILABLE" and process.wait(PATIENCE) == 1
