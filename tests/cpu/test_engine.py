"""The whole engine against transformers: equal float32 tokens with paging, sharing, chunks, preemption and forks on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import cpu
from launch.llm import LLM, RequestOutput
from pagetable.errors import QuireError
from pagetable.sampling import SamplingParams
from tests.models import TWELVE, make_model, reference

MARGIN = 1e-4  # DESIGN section 8: below it the reference's two best tokens are a tie
LENGTHS = (1, 2, 15, 16, 17, 60, 130, 257, 411, 700)
NUM_TOKENS = 24


def drawn(seed: int, length: int, vocab: int = 331) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, vocab) for _ in range(length)]


class Greedy:
    """transformers' greedy continuation of one prompt, and how close its two best tokens were at each step."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.compared = self.ties = 0

    @torch.inference_mode()
    def run(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        ids = torch.tensor([prompt])
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [logits[0].topk(2).values for logits in found.logits]
        return found.sequences[0, len(prompt) :].tolist(), [float(b[0] - b[1]) for b in best]

    def check(self, prompt: list[int], tokens: list[int]) -> None:
        """`tokens` equal the reference's, or part from it at a tie, which is printed."""
        expected, margins = self.run(prompt, len(tokens))
        for at, (own, other, margin) in enumerate(zip(tokens, expected, margins, strict=True)):
            self.compared += 1
            if own != other:
                assert margin < MARGIN, f"prompt of {len(prompt)}, token {at}: {own}, not {other} (margin {margin:.2g})"
                print(f"tie: prompt of {len(prompt)}, token {at}: {own} and {other} are {margin:.1e} apart")
                self.ties += 1
                return


@pytest.fixture(scope="module", params=TWELVE, ids=[name for name, _, _ in TWELVE])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, arch, overrides = request.param
    return make_model(tmp_path_factory.mktemp(name), arch, seed=5, **overrides)


def check_all(folder: Path, outputs: list[RequestOutput]) -> None:
    greedy = Greedy(reference(folder))
    for output in outputs:
        for sample in output.outputs:
            greedy.check(list(output.prompt_token_ids), sample.token_ids)
    assert greedy.compared >= 200 and greedy.ties <= 1


def test_tokens_equal_transformers_in_a_pool_too_small_for_the_batch(model: Path) -> None:
    """Prompts of 1 to 700 tokens, shared prefixes, two samples, chunked prefill and preemption, all at once."""
    llm = LLM(
        str(model),
        block_size=4,
        max_model_len=740,
        num_gpu_blocks_override=185,
        max_num_seqs=14,
        max_num_batched_tokens=80,
        threads=2,
    )
    prompts = [drawn(i, length) for i, length in enumerate(LENGTHS)]
    prompts += [prompts[7][:200] + drawn(77, 31), prompts[7][:200] + drawn(78, 8), prompts[5], prompts[5] + [9]]
    params = [
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS if len(prompt) > 60 else 90, ignore_eos=True, n=1 + i % 2)
        for i, prompt in enumerate(prompts)
    ]
    outputs = llm.generate(prompts, params)
    scheduler = llm.loop.scheduler
    assert scheduler.num_preemptions > 0, "the pool was to be too small"
    assert sum(output.num_cached_tokens > 0 for output in outputs) >= 2, "prefixes were to be shared"
    check_all(model, outputs)
    scheduler.pool.flush()
    scheduler.check()
    assert scheduler.pool.num_available == scheduler.pool.num_free == 185


def test_sharing_off_changes_no_token(model: Path) -> None:
    prefix = drawn(1, 100)
    prompts = [prefix + drawn(i, i) for i in range(1, 6)]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, n=2)
    settings: dict[str, Any] = {"num_gpu_blocks_override": 256, "max_model_len": 256, "max_num_batched_tokens": 300}
    streams = []
    for sharing in (True, False):
        llm = LLM(str(model), enable_prefix_caching=sharing, **settings)
        outputs = llm.generate(prompts, greedy)
        streams.append([sample.token_ids for output in outputs for sample in output.outputs])
        if sharing:
            check_all(model, outputs)
        else:
            assert all(output.num_cached_tokens == 0 for output in outputs)
    assert streams[0] == streams[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("small"), "llama", seed=2)


def open_small(small: Path, **settings: Any) -> LLM:
    defaults: dict[str, Any] = {"num_gpu_blocks_override": 200, "max_model_len": 400, "threads": 1}
    return LLM(str(small), **{**defaults, **settings})


def test_a_prefix_is_stored_once(small: Path) -> None:
    """32 requests at once on one prefix of 20 pages: 20 pages, and one more for each request's own tokens."""
    llm = open_small(small)
    prefix = drawn(1, 320)
    for i in range(32):
        llm.add_request(
            {"prompt_token_ids": [*prefix, 2 + i, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        )
    llm.step()
    assert len(llm.loop.scheduler.running) == 32, "the prefix is computed once, so all fit in the first step"
    llm.step()
    assert llm.loop.scheduler.pool.num_used == 20 + 32
    shared = {tuple(s.table.pages[:20]) for s in llm.loop.scheduler.running}
    assert len(shared) == 1
    assert llm.loop.scheduler.pool.users(next(iter(llm.loop.scheduler.running)).table.pages[0]) == 32  # type: ignore[arg-type]


def test_a_fork_copies_only_the_partial_last_page(small: Path) -> None:
    llm = open_small(small)
    parent = llm.add_request(
        {"prompt_token_ids": drawn(3, 100), "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    )
    for _ in range(6):
        llm.step()
    pool = llm.loop.scheduler.pool
    assert pool.num_used == 7
    child = llm.fork(parent, temperature=1.0, seed=3)
    llm.step()
    assert pool.num_used == 8
    sequences = {s.request.request_id: s for s in llm.loop.scheduler.running}
    ours, theirs = sequences[parent].table.pages, sequences[child].table.pages
    assert ours[:6] == theirs[:6] and ours[6] != theirs[6]
    while llm.loop.has_work:
        llm.step()
    before, after = llm.pop(parent).outputs[0].token_ids, llm.pop(child).outputs[0].token_ids
    assert before[:6] == after[:6] and before != after and len(after) == 40
    Greedy(reference(small)).check(drawn(3, 100), before)


def test_a_greedy_fork_repeats_its_parent_and_its_pages_merge(small: Path) -> None:
    llm = open_small(small)
    parent = llm.add_request({"prompt_token_ids": drawn(3, 50), "max_tokens": 60, "temperature": 0, "ignore_eos": True})
    llm.step()
    llm.step()
    child = llm.fork(parent)
    while llm.loop.has_work:
        llm.step()
    one, two = llm.pop(parent).outputs[0], llm.pop(child).outputs[0]
    assert one.token_ids == two.token_ids
    assert one.pages[:6] == two.pages[:6], "pages of equal content are one page once they are full"


SAMPLED = SamplingParams(
    temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=11, max_tokens=20, ignore_eos=True, n=3
)


def test_random_tokens_depend_on_seed_sample_and_position_alone(small: Path) -> None:
    """Not on the batch, the slot, the chunks, preemption or sharing."""
    prompt = drawn(4, 90)
    alone = open_small(small).generate([prompt], SAMPLED)[0]
    crowded = open_small(
        small, num_gpu_blocks_override=26, max_num_batched_tokens=40, max_num_seqs=6, enable_prefix_caching=False
    )
    others = [drawn(50 + i, 60 + i) for i in range(7)]
    found = crowded.generate([*others, prompt], SAMPLED)[-1]
    assert crowded.loop.scheduler.num_preemptions > 0
    assert [s.token_ids for s in found.outputs] == [s.token_ids for s in alone.outputs]
    assert len({tuple(s.token_ids) for s in alone.outputs}) == 3


@pytest.mark.skipif(not cpu.levels(), reason="the native kernels are not built")
def test_int8_pages_change_no_token_when_shared_preempted_or_computed_again(small: Path) -> None:
    """A page's bytes are what its tokens say, whoever writes them and however often."""
    prompts = [drawn(3, 64) + drawn(60 + i, 5 + 9 * i) for i in range(7)]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    settings = {"kv_cache_dtype": "int8", "deterministic": True}
    alone = [open_small(small, **settings).generate([prompt], params)[0] for prompt in prompts]
    crowded = open_small(small, num_gpu_blocks_override=26, max_num_batched_tokens=40, max_num_seqs=6, **settings)
    found = crowded.generate(prompts, params)
    assert crowded.loop.scheduler.num_preemptions > 0
    assert sum(output.num_cached_tokens for output in found) >= 64
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids


def test_logprobs_and_prompt_logprobs_equal_transformers(small: Path) -> None:
    prompt = drawn(6, 75)
    llm = open_small(small, max_num_batched_tokens=40, max_num_seqs=4)
    llm.generate([prompt], SamplingParams(max_tokens=1))  # a cached prefix must not cost a prompt logprob
    params = SamplingParams(temperature=0, max_tokens=10, logprobs=5, prompt_logprobs=3, ignore_eos=True)
    output = llm.generate([prompt], params)[0]
    tokens = [*prompt, *output.outputs[0].token_ids]
    with torch.inference_mode():
        expected = reference(small)(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 75
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    for position, entry in enumerate(entries):
        assert entry is not None
        row = expected[position]
        assert abs(entry.logprob - float(row[tokens[position + 1]])) < 2e-4
        assert entry.rank == int((row > row[tokens[position + 1]]).sum()) + 1
        best = row.topk(len(entry.top))
        assert [t for t, _ in entry.top] == best.indices.tolist()
    total = sum(entry.logprob for entry in output.outputs[0].logprobs)
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def test_ends(small: Path) -> None:
    llm = open_small(small)
    prompt = drawn(8, 30)
    free = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0]
    assert (free.finish_reason, free.stop_reason, len(free.token_ids)) == ("length", None, 12)
    stop = free.token_ids[4]
    first = free.token_ids.index(stop) + 1
    ended = llm.generate(
        [prompt], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    )
    assert (ended[0].outputs[0].finish_reason, ended[0].outputs[0].stop_reason) == ("stop", stop)
    assert ended[0].outputs[0].token_ids == free.token_ids[:first]
    later = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,), min_tokens=first + 1)
    found = llm.generate([prompt], later)[0].outputs[0].token_ids
    assert len(found) > first and stop not in found[: first + 1]
    request = llm.add_request({"prompt_token_ids": prompt, "max_tokens": 100})
    llm.step()
    assert llm.abort(request).outputs[0].finish_reason == "cancelled"
    assert llm.loop.scheduler.pool.num_used == 0 and not llm.loop.has_work


def test_an_exact_fit_is_served_and_one_token_more_is_refused(small: Path) -> None:
    llm = open_small(small, num_gpu_blocks_override=25, max_model_len=400)
    exact: dict[str, Any] = {"prompt_token_ids": drawn(9, 200), "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    results = llm.generate_raw([exact, {**exact, "max_tokens": 201}, exact])
    assert [isinstance(result, QuireError) for result in results] == [False, True, False]
    assert isinstance(results[0], RequestOutput) and isinstance(results[2], RequestOutput)
    assert results[0].outputs[0].token_ids == results[2].outputs[0].token_ids
    assert len(results[0].outputs[0].token_ids) == 200


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failing_step_ends_its_requests_and_no_others(
    small: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_small(small, async_scheduling=ahead)
    prompt = drawn(10, 40)
    canary = (
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].outputs[0].token_ids
    )
    run = llm.loop.pipe.runner.run
    calls = iter([False, True])

    def fail(plan: Any) -> Any:
        if next(calls, False):
            raise MemoryError("planted")
        return run(plan)

    monkeypatch.setattr(llm.loop.pipe.runner, "run", fail)
    results = llm.generate_raw([{"prompt_token_ids": drawn(11, 20), "max_tokens": 8}] * 3)
    for result in results:
        assert isinstance(result, RequestOutput)
        assert result.outputs[0].finish_reason == "error" and "MemoryError" in str(result.outputs[0].stop_reason)
    llm.loop.scheduler.check()
    assert llm.loop.scheduler.pool.num_used == 0
    again = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].outputs[0].token_ids
    assert again == canary
