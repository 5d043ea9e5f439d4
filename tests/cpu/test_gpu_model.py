"""The model of GPUs, in Triton's interpreter or on a GPU, against transformers and torch's decoder."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels import ops
from kernels.triton_attention import Triton
from launch.llm import LLM
from pagetable.errors import ConfigError
from pagetable.ids import SequenceId
from pagetable.sampling import SamplingParams
from tests.model_rig import Rig, greedy, prompts, run_all, run_reference
from tests.models import TWELVE, make_model, reference
from tests.triton_inputs import DEVICE
from worker.gpu_model import GpuModel
from worker.loop import Inline
from worker.model import Decoder
from worker.plan import Admit, Plan
from worker.runner import NOT_FINITE, Runner
from worker.sampler import Sampler, choose_by_torch

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
LENGTHS = (1, 17, 38)
CHUNKS = (1, 17, 9)
# one of each that the kernels tell apart: biases, q/k norms, windows, rope scalings, odd groups, tied heads
NAMES = ("llama-9-3-legacy", "mistral-window", "qwen2-mixed-window", "qwen3-128-tied")
SOME = [case for case in TWELVE if case[0] in NAMES]


def rig_of(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Rig:
    return Rig.make(folder, dtype, kind="gpu", device=DEVICE, backend=Triton(), **more)


@pytest.mark.parametrize("case", SOME, ids=[case[0] for case in SOME])
def test_float32_logits_equal_those_of_transformers(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    _, arch, overrides = case
    folder = make_model(tmp_path, arch, seed=3, **overrides)
    sequences = prompts(LENGTHS)
    expected = run_reference(folder, sequences)
    found = run_all(rig_of(folder, block_size=4), sequences, CHUNKS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("case", SOME[:1], ids=[case[0] for case in SOME[:1]])
def test_bfloat16_is_as_near_to_float32_as_transformers(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    _, arch, overrides = case
    folder = make_model(tmp_path, arch, seed=4, dtype="bfloat16", **overrides)
    sequences = prompts(LENGTHS)
    exact = torch.cat(run_reference(folder, sequences, torch.float32))
    theirs = torch.cat(run_reference(folder, sequences, torch.bfloat16))
    ours = torch.cat(run_all(rig_of(folder, torch.bfloat16), sequences, CHUNKS))
    assert 0 < (ours - exact).norm() <= (theirs - exact).norm()


def admit(slot: int, tokens: list[int], **params: Any) -> Admit:
    sampling = SamplingParams(**{"temperature": 0.0, "seed": slot, **params})
    return Admit(slot, SequenceId(slot), 0, sampling, len(tokens), array("i", tokens))


def sampled(plan: Plan, positions: list[int]) -> Plan:
    """Every row of the plan samples, the i-th for slot i."""
    plan.sample_row = array("i", (end - 1 for end in plan.query_start[1:]))
    plan.sample_slot, plan.sample_position = array("i", range(len(positions))), array("i", positions)
    return plan


def say(rig: Rig, sequences: list[list[int]], count: int, **params: Any) -> list[list[int]]:
    """What a runner samples for all of them, `count` tokens each."""
    model = rig.model
    choose_by = choose_by_torch if isinstance(model, Decoder) else model.choose
    runner = Runner(model, rig.cache, rig.tables, Sampler(model.config.vocab_size, 16, choose_by))
    plan = rig.plan([(slot, 0, tokens) for slot, tokens in enumerate(sequences)])
    plan.admits = [admit(slot, tokens, **params) for slot, tokens in enumerate(sequences)]
    found: list[list[int]] = [[] for _ in sequences]
    for step in range(count):
        result = runner.run(sampled(plan, [len(tokens) + step for tokens in sequences]))
        assert result is not None and not result.failed
        for tokens, token in zip(found, result.tokens, strict=True):
            tokens.append(token)
        plan = rig.plan([(slot, len(sequences[slot]) + step, [found[slot][-1]]) for slot in range(len(sequences))])
    return found


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    folder = make_model(tmp_path, seed=6)
    theirs, sequences = reference(folder), prompts(LENGTHS)
    assert say(rig_of(folder), sequences, 6) == [greedy(theirs, tokens, 6) for tokens in sequences]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.6, "min_p": 0.02, "repetition_penalty": 1.3},
        {"temperature": 0.7, "logit_bias": {5: 4.0}, "min_tokens": 3, "stop_token_ids": (9,), "logprobs": 3},
    ],
    ids=["all", "top_k", "top_p", "edited"],
)
def test_drawn_tokens_are_those_of_the_other_decoders(params: dict[str, Any], tmp_path: Path) -> None:
    folder, sequences = make_model(tmp_path, seed=7), prompts(LENGTHS)
    expected = say(Rig.make(folder), sequences, 4, **params)
    assert say(rig_of(folder), sequences, 4, **params) == expected
    assert len({token for tokens in expected for token in tokens}) > 5


def test_scores_of_a_prompt_and_a_copied_page(tmp_path: Path) -> None:
    folder = make_model(tmp_path, seed=8)
    prompt = prompts(LENGTHS)[-1]
    found = []
    for rig in (rig_of(folder), Rig.make(folder)):
        model = rig.model
        runner = Runner(model, rig.cache, rig.tables, Sampler(model.config.vocab_size, 16))
        plan = rig.plan([(0, 0, prompt)])
        plan.admits = [admit(0, prompt, prompt_logprobs=2)]
        plan.score_row, plan.score_slot = array("i", range(20)), array("i", [0] * 20)
        plan.score_token = array("i", prompt[1:21])
        first = runner.run(plan)
        assert first is not None
        # slot 1: the first two pages are shared, the third is a copy
        target = rig.free.pop()
        plan = rig.plan([(1, len(prompt), [7])])
        plan.table_slot, plan.table_index = array("i", [1] * 3), array("i", range(3))
        plan.table_group = array("i", [0] * 3)
        plan.table_blocks = [array("i", [*rig.tables.tables[0, :2].tolist(), target])]
        plan.copy_from = plan.copy_to = array("i", [0])
        plan.copy_targets = [array("i", [target])]
        plan.copy_sources = [array("i", [int(rig.tables.tables[0, 2])])]
        plan.admits = [admit(1, [*prompt, 7])]
        plan.sample_row, plan.sample_slot = array("i", [0]), array("i", [1])
        plan.sample_position = array("i", [len(prompt) + 1])
        second = runner.run(plan)
        assert second is not None
        found.append(([score.logprob for score in first.scores], [s.top for s in first.scores], second.tokens))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert [[token for token, _ in top] for top in found[0][1]] == [[token for token, _ in top] for top in found[1][1]]
    assert found[0][2] == found[1][2]


def test_a_row_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    rig = rig_of(make_model(tmp_path, seed=9))
    rows = [(slot, 0, tokens[:20]) for slot, tokens in enumerate(prompts((20, 20, 20)))]
    healthy = [int(rig.logits([row])[-1].argmax()) for row in rows]
    rig.cache.pool[:, int(rig.tables.tables[1, 0]), 0] = float("nan")
    plan = rig.plan([(slot, 19, tokens[19:]) for slot, _, tokens in rows])
    plan.admits = [admit(slot, tokens) for slot, _, tokens in rows]
    runner = Runner(rig.model, rig.cache, rig.tables, Sampler(331, 16))
    result = runner.run(sampled(plan, [20] * 3))
    assert result is not None
    assert list(result.tokens) == [healthy[0], -1, healthy[2]]
    assert result.failed == {1: NOT_FINITE}


def test_a_warm_up_writes_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.gpu_model._LONG", 600)  # the interpreter is slow
    _, arch, overrides = next(case for case in TWELVE if case[0] == "qwen2-mixed-window")
    rig = rig_of(make_model(tmp_path, arch, **overrides), block_size=4)
    before = rig.cache.pool.clone().view(torch.int32)
    assert isinstance(rig.model, GpuModel)
    with torch.inference_mode():
        rig.model.warm_up(rig.cache)
    assert torch.equal(rig.cache.pool.view(torch.int32), before)


def test_an_engine_on_it_says_what_the_cpus_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, a shared prefix, two samples, a preemption; only the kernels differ."""
    folder = make_model(tmp_path, "llama", seed=6)
    tokens = prompts((30, 9))
    asked = [tokens[0], tokens[0][:24] + tokens[1], tokens[1]]
    params = [SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=6, ignore_eos=True, n=2) for i in range(3)]
    settings: dict[str, Any] = {
        "max_model_len": 64,
        "block_size": 4,
        "num_gpu_blocks_override": 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 20,
    }
    device = "cpu"
    own = LLM(str(folder), **settings, device="cpu").generate(asked, params)
    expected = [each.token_ids for output in own for each in output.outputs]
    if DEVICE.type == "cuda":
        device = "cuda"
    else:
        monkeypatch.setattr(ops, "default_backend", Triton)
    llm = LLM(str(folder), **settings, device=device)
    assert isinstance(llm.loop.pipe, Inline) and isinstance(llm.loop.pipe.runner.model, GpuModel)
    assert [each.token_ids for output in llm.generate(asked, params) for each in output.outputs] == expected
    assert llm.loop.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("deterministic", True), ("kv_cache_dtype", "int8"), ("dtype", "float32")],
    ids=["deterministic", "int8", "a dtype"],
)
def test_what_its_kernels_can_not_do_is_refused(
    field: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Triton()
    if field == "dtype":  # as FlashInfer's
        backend.takes = replace(backend.takes, kinds=(torch.bfloat16, torch.float16))
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    with pytest.raises(ConfigError) as refused:
        LLM(str(make_model(tmp_path)), max_model_len=64, num_gpu_blocks_override=8, device="cpu", **{field: value})
    assert refused.value.field == field


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU says itself that it is mixed up with the host")
def test_a_step_keeps_to_its_device_and_waits_for_it_once() -> None:
    """On a device of which the host can't read: see tests/far_model.py. A process of its own: torch keeps devices."""
    done = subprocess.run([sys.executable, "-m", "tests.far_model"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"uploads": 3, "downloads": 1, "waits": 0}
