"""Every layout of up to 8 ranks says the tokens of one rank, with sharing, chunks, preemption, forks and cancels on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagetable.errors import ConfigError
from pagetable.sampling import Request
from tests.models import make_model
from tests.rank_lab import Hosts, Tape, make_spec, request
from worker.layout import Layout
from worker.loop import Loop
from worker.plan import Plan
from worker.sequence import FinishReason
from worker.shard import ShardSpec

VOCAB, LAYERS = 331, 3
HEADS = ((6, 2), (8, 1), (12, 4), (28, 4))
LAYOUTS = [
    Layout(tensor, pipeline, page)
    for tensor in (1, 2, 4)
    for page in (1, 2, 4)
    for pipeline in (1, 2, 3)
    if tensor % page == 0 and 1 < tensor * pipeline <= 8
]
# a pool that all requests together do not fit into, and steps that cut prompts
TIGHT: dict[str, Any] = {"num_blocks": 32, "max_num_seqs": 8, "max_num_batched_tokens": 40, "max_model_len": 256}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    found = Hosts()
    yield found
    found.close()


@pytest.fixture(scope="module", params=HEADS, ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"), *request.param)


def make(folder: Path, q: int, kv: int, layers: int = LAYERS, longest: int = 256) -> Path:
    return make_model(
        folder,
        seed=q,
        vocab_size=VOCAB,
        num_hidden_layers=layers,
        num_attention_heads=q,
        num_key_value_heads=kv,
        head_dim=16,
        hidden_size=16 * q,
        intermediate_size=150,
        max_position_embeddings=longest,
    )


def requests(spec: ShardSpec) -> list[Request]:
    rng = random.Random(5)

    def drawn(length: int) -> list[int]:
        return [rng.randrange(2, VOCAB) for _ in range(length)]

    prefix = drawn(37)
    prompts = [prefix + drawn(each) for each in (1, 19, 60)] + [drawn(each) for each in (1, 8, 33, 130)]
    return [
        request(
            spec,
            f"r{index}",
            prompt,
            max_tokens=70,
            ignore_eos=True,
            temperature=0.7 if index % 3 == 2 else 0.0,
            seed=index,
            n=3 if index == 1 else 1,
            logprobs=2 if index == 4 else None,
        )
        for index, prompt in enumerate(prompts)
    ]


def alone(spec: ShardSpec, hosts: Hosts) -> dict[tuple[str, int], list[int]]:
    """Each request by itself, on one rank."""
    tape = Tape()
    with hosts.loop(spec) as (loop, _):
        for each in requests(spec):
            loop.add(each)
            while loop.has_work:
                tape.take(loop.step())
    return tape.tokens


@pytest.fixture(scope="module")
def expected(folder: Path, hosts: Hosts) -> dict[tuple[str, int], list[int]]:
    return alone(make_spec(folder, max_model_len=256), hosts)


def run(loop: Loop, spec: ShardSpec) -> Tape:
    """All requests, two by two; two that are cancelled on their way; a fork."""
    tape = Tape()
    todo = requests(spec)
    doomed = [request(spec, f"x{index}", list(range(2, 60)), max_tokens=90, ignore_eos=True) for index in range(2)]
    step = 0
    while todo or loop.has_work:
        if step % 2 == 0:
            for each in todo[:2]:
                loop.add(each)
            del todo[:2]
        if step == 3:
            for each in doomed:
                loop.add(each)
        if step == 9:
            loop.cancel("x0")
        tape.take(loop.step())
        if len(tape.tokens.get(("r0", 0), ())) >= 5 and ("fork", 0) not in tape.tokens and "fork" not in tape.forks:
            tape.forks.add("fork")
            parent = requests(spec)[0]
            loop.fork("r0", 0, request(spec, "fork", parent.prompt, max_tokens=70, ignore_eos=True, temperature=0.0))
        if len(tape.tokens.get(("x1", 0), ())) >= 7 and loop.scheduler.is_in_flight("x1"):
            loop.cancel("x1")
        loop.scheduler.check()
        step += 1
    return tape


def test_two_stages_of_every_model_here_end_inside_an_mlp(folder: Path) -> None:
    """Three of three layers do not, so that rows go on in both ways below."""
    model = make_spec(folder).model
    for layout in LAYOUTS:
        if layout.is_possible(model):
            assert any(part.is_cut for part in layout.parts(model)) == (layout.pipeline == 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: f"T{each.tensor}P{each.pipeline}G{each.page}")
def test_every_layout_says_the_tokens_of_one_rank(
    layout: Layout, folder: Path, hosts: Hosts, expected: dict[tuple[str, int], list[int]]
) -> None:
    spec = make_spec(folder, layout, **TIGHT)
    if not layout.is_possible(spec.model):
        with pytest.raises(ConfigError, match="possible: "):
            layout.check(spec.model)
        return
    check(spec, hosts, expected)


@pytest.mark.parametrize("layout", [Layout(1, 3), Layout(2, 3), Layout(2, 3, 2)], ids=str)
def test_so_does_a_stage_that_begins_and_ends_inside_mlps(layout: Layout, tmp_path: Path, hosts: Hosts) -> None:
    spec = make_spec(make(tmp_path, 6, 2, layers=4), layout, **TIGHT)
    assert any(part.is_carrying and part.is_cut for part in layout.parts(spec.model))
    check(spec, hosts, alone(make_spec(tmp_path, max_model_len=256), hosts))


@pytest.mark.parametrize("layout", [Layout(2), Layout(4, 1, 2), Layout(4, 1, 4)], ids=str)
def test_so_it_does_where_steps_are_long_enough_to_be_summed_in_bands(
    layout: Layout, tmp_path: Path, hosts: Hosts
) -> None:
    spec = make_spec(make(tmp_path, 12, 4, longest=1024), layout, max_num_batched_tokens=1000)
    rng = random.Random(11)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(length)] for length in (700, 193, 430, 40)]
    longest = 0

    def see(plan: Plan) -> None:
        nonlocal longest
        longest = max(longest, plan.num_tokens)

    def tokens(spec: ShardSpec) -> dict[tuple[str, int], list[int]]:
        tape = Tape()
        with hosts.loop(spec) as (loop, _):
            loop.on_plan = see
            for at, prompt in enumerate(prompts):
                loop.add(request(spec, f"r{at}", prompt, max_tokens=9, ignore_eos=True, temperature=0.0))
            while loop.has_work:
                tape.take(loop.step())
        return tape.tokens

    found = tokens(spec)
    assert longest > 192, "the rows of a band"
    assert found == tokens(make_spec(tmp_path)) and len(found) == len(prompts)


AHEAD = [Layout(), Layout(2), Layout(2, 1, 2), Layout(4, 1, 4), Layout(1, 2), Layout(2, 2, 2)]


@pytest.mark.parametrize("layout", AHEAD, ids=lambda each: f"T{each.tensor}P{each.pipeline}G{each.page}")
def test_so_it_does_with_plans_made_ahead(
    layout: Layout, folder: Path, hosts: Hosts, expected: dict[tuple[str, int], list[int]]
) -> None:
    spec = make_spec(folder, layout, **TIGHT, async_scheduling=True)
    if layout.is_possible(spec.model):
        check(spec, hosts, expected)


def check(spec: ShardSpec, hosts: Hosts, expected: dict[tuple[str, int], list[int]]) -> None:
    moves = 0

    def count(plan: Plan) -> None:
        nonlocal moves
        moves += sum(a != b for a, b in zip(plan.copy_from, plan.copy_to, strict=True))

    with hosts.loop(spec) as (loop, _):
        loop.on_plan = count
        tape = run(loop, spec)
        pool = loop.scheduler.pool
        assert loop.scheduler.num_preemptions > 0 and pool.num_used == 0
        assert moves > 0 or spec.layout.page < 4, "the load leaves nothing uneven"
    found = {key: tokens for key, tokens in tape.tokens.items() if key in expected}
    assert found == expected
    base = expected["r0", 0]
    fork = tape.tokens["fork", 0]
    assert fork == base[len(base) - len(fork) :] and len(fork) >= 1
    assert all(tape.ends[key].finish_reason is FinishReason.LENGTH for key in expected)
    devices = {device for output in tape.ends.values() for device, _ in output.pages}
    assert devices == set(range(spec.layout.page))


def test_a_batch_from_the_command_line_over_ranks(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", 8, 1)
    lines = [{"prompt_token_ids": list(range(2, 40 + 9 * i)), "max_tokens": 9, "temperature": 0} for i in range(4)]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def generate(*flags: str) -> tuple[list[dict[str, Any]], str]:
        code = "import sys; from launch.cli import main; sys.exit(main())"
        words = ("generate", str(folder), "--prompts", str(path), "--json", "--threads", "1", *flags)
        small = ("--num-gpu-blocks-override", "64", "--max-model-len", "256")
        done = subprocess.run([sys.executable, "-c", code, *words, *small], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["outputs"][0] for line in done.stdout.splitlines()], done.stderr

    expected, _ = generate()
    found, notes = generate("-tp", "2", "-pp", "2", "--page-parallel-size", "2")
    assert [each["token_ids"] for each in found] == [each["token_ids"] for each in expected]
    assert {device for each in found for device, _ in each["pages"]} == {0, 1}
    assert "over 4 ranks (tensor 2, pipeline 2, page 2)" in notes
