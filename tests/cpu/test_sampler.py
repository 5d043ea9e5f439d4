"""The sampler against a float64 reference written from the definitions, and against transformers' processors.

All of it with torch's `choose` and with the native one of each instruction level of this machine.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels import cpu, decoder
from pagetable.ids import SequenceId
from pagetable.sampling import SamplingParams
from worker import draw
from worker.draw import Shape, best, choose, stream_key, uniforms
from worker.native_model import choices_of
from worker.plan import Admit
from worker.sampler import CHUNK, Choose, Sampler, choose_by_torch

Ids = tuple[int, ...]
CHOOSERS: dict[str, Choose] = {"torch": choose_by_torch} | {
    level: partial(lambda backend, rows, shape: decoder.choose(rows, choices_of(shape), backend), cpu.Native(level))
    for level in cpu.levels()
}
chosen: Choose = choose_by_torch
PROMPT = (3, 1, 4, 1, 5)


def admit(
    slot: int = 0, *, index: int = 0, outputs: tuple[int, ...] = (), eos: tuple[int, ...] = (), **p: Any
) -> Admit:
    params = SamplingParams(**{"seed": 17, "max_tokens": 100, **p})
    tokens = array("i", (*PROMPT, *outputs))
    return Admit(slot, SequenceId(slot), index, params, len(PROMPT), tokens, eos)


@pytest.fixture(scope="module", params=CHOOSERS, autouse=True)
def chooser(request: pytest.FixtureRequest) -> Iterator[None]:
    global chosen
    chosen = CHOOSERS[request.param]
    yield
    chosen = choose_by_torch


def sampler(vocab: int, *admits: Admit, chunk: int = CHUNK) -> Sampler:
    made = Sampler(vocab, 1 + max(each.slot for each in admits), chosen, chunk)
    for each in admits:
        made.admit(each)
    return made


def sample(of: Sampler, logits: torch.Tensor, slots: list[int], positions: list[int]) -> list[int]:
    return of.sample(logits, array("i", slots), array("i", positions))[0].tolist()


def random_logits(rows: int, vocab: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# the reference: one row, float64, plain Python


def splitmix(state: int, count: int) -> int:
    """Output number `count` of Vigna's splitmix64 (https://prng.di.unimi.it/splitmix64.c) from `state`."""
    z = (state + (count + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def reference_logits(row: list[float], a: Admit) -> list[float]:
    p, x = a.params, list(row)
    outputs = list(a.tokens[a.prompt_length :])
    if len(outputs) < p.min_tokens:
        for end in {*a.eos_token_ids, *p.stop_token_ids}:
            x[end] = -math.inf
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for token in set(a.tokens):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(outputs):
        x[token] -= p.frequency_penalty * outputs.count(token) + p.presence_penalty
    return x


def reference(row: list[float], a: Admit, position: int) -> int:
    p, x = a.params, reference_logits(row, a)
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if p.temperature == 0:
        return order[0]
    weight = [math.exp((v - x[order[0]]) / p.temperature) if v > -math.inf else 0.0 for v in x]
    keep = [i for i in order if weight[i] >= p.min_p]
    keep = keep[: p.top_k] if p.top_k > 0 else keep
    total, before, nucleus = math.fsum(weight[i] for i in keep), 0.0, []
    for i in keep:
        if p.top_p >= 1 or before < p.top_p * total:
            nucleus.append(i)
        before += weight[i]
    key = 0
    for part in (p.seed, a.sample_index):
        key = splitmix(key ^ (part or 0), 0)
    target = (splitmix(key, position) >> 11) / 2**53 * math.fsum(weight[i] for i in nucleus)
    reached = 0.0
    for i in sorted(nucleus):
        reached += weight[i]
        if reached > target:
            return i
    raise AssertionError("the weights did not reach their own sum")


def test_random_numbers_are_the_published_generators() -> None:
    # the first outputs from state 1234567, as printed by the C program
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix(1234567, i) for i in range(4)] == known
    got = uniforms(np.full(4, 1234567, np.uint64), np.arange(4))
    assert got.tolist() == [(each >> 11) / 2**53 for each in known]
    assert uniforms(np.array([2**64 - 1], np.uint64), np.array([2**31 - 1]))[0] < 1.0


def test_streams_of_seeds_and_samples_differ() -> None:
    keys = {stream_key(seed, index) for seed in (0, 1, 2, 2**32, 2**63 - 1) for index in range(16)}
    assert len(keys) == 80
    assert stream_key(1, 2) != stream_key(2, 1)


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.01, 0.7, 1, 1.5, 100.0]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 5, 23, 24, 1000]),
        "top_p": st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        # all exact in float32: a rounding must not decide a tie
        "repetition_penalty": st.sampled_from([1.0, 2.0, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, -0.75]),
        "logit_bias": st.dictionaries(st.integers(0, 23), st.sampled_from([-100.0, -1.5, 2.25, 100.0]), max_size=3),
        "min_tokens": st.sampled_from([0, 3, 50]),
        "stop_token_ids": st.lists(st.integers(0, 23), max_size=2),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_equals_the_reference_with_any_parameters_in_any_company(data: st.DataObject) -> None:
    vocab, rows = 24, data.draw(st.integers(1, 5))
    # few distinct values, so that ties are common
    values = st.lists(st.integers(-8, 8), min_size=vocab, max_size=vocab)
    logits = torch.tensor([data.draw(values) for _ in range(rows)], dtype=torch.float32) / 2
    slots = data.draw(st.permutations(range(rows + 2)))[:rows]
    outputs = st.lists(st.integers(0, vocab - 1), max_size=5).map(tuple)
    admits = [
        admit(slot, index=data.draw(st.integers(0, 15)), outputs=data.draw(outputs), eos=(0, 7), **data.draw(PARAMS))
        for slot in slots
    ]
    made, kept = sampler(vocab, *admits), logits.clone()
    for step in range(3):
        positions = [len(each.tokens) for each in admits]
        got = sample(made, logits, slots, positions)
        for row, (each, position, token) in enumerate(zip(admits, positions, got, strict=True)):
            assert token == reference(logits[row].tolist(), each, position), (step, row)
            each.tokens.append(token)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("scale", [0.05, 3.0])
@pytest.mark.parametrize(
    "p",
    [
        {},
        {"min_p": 0.2},
        {"top_p": 0.9},
        {"top_p": 0.9, "min_p": 0.01},
        {"top_k": 7},
        {"top_k": 1500},
        {"top_k": 1500, "top_p": 0.7},
        {"top_k": 40, "top_p": 0.7},
        {"repetition_penalty": 1.2, "top_p": 0.5},
    ],
)
def test_equals_the_reference_over_a_large_vocabulary(p: dict[str, Any], scale: float) -> None:
    """Flat rows need more than the candidates that top-p looks at first; rounded ones have ties at every edge."""
    vocab, rows = 3000, 6
    logits = random_logits(rows, vocab, 1, scale)
    logits[::2] = logits[::2].bfloat16().float()
    admits = [admit(slot, index=slot, **p) for slot in range(rows)]
    got = sample(sampler(vocab, *admits), logits, list(range(rows)), [9] * rows)
    assert got == [reference(row.tolist(), each, 9) for row, each in zip(logits, admits, strict=True)]


@pytest.mark.parametrize("p", [{"top_k": 5000}, {"top_k": 8999, "top_p": 0.9}, {"top_p": 0.999}, {"temperature": 9.0}])
def test_equals_the_reference_where_almost_all_is_kept(p: dict[str, Any]) -> None:
    vocab, rows = 9001, 3
    logits = random_logits(rows, vocab, 4, 1.0)
    logits[1] = logits[1].bfloat16().float()
    logits[2, ::3] = -torch.inf
    admits = [admit(slot, index=slot, **p) for slot in range(rows)]
    got = sample(sampler(vocab, *admits), logits, list(range(rows)), [2] * rows)
    assert got == [reference(row.tolist(), each, 2) for row, each in zip(logits, admits, strict=True)]


def test_a_row_does_not_depend_on_batch_slot_or_chunk() -> None:
    vocab, kinds = 2500, [{}, {"top_p": 0.8}, {"top_k": 9}, {"temperature": 0}, {"min_p": 0.1}, {"top_k": 2000}]
    kinds += [{"repetition_penalty": 1.5}, {"logit_bias": {7: 3.0}, "top_p": 0.3}]
    logits = random_logits(len(kinds), vocab, 2, 0.5)
    alone = []
    for row, p in enumerate(kinds):
        alone += sample(sampler(vocab, admit(3, index=row, **p)), logits[row : row + 1], [3], [40 + row])
    order = [5, 0, 7, 2, 6, 1, 3, 4]
    for chunk in (1, 3 * vocab, 1 << 20):
        slots = {row: 20 - 2 * row for row in order}
        made = sampler(vocab, *(admit(slots[row], index=row, **kinds[row]) for row in order), chunk=chunk)
        together = sample(made, logits[order], [slots[row] for row in order], [40 + row for row in order])
        assert together == [alone[row] for row in order]


def test_one_row_of_logits_gives_each_sample_its_own_token() -> None:
    vocab = 50
    row = random_logits(1, vocab, 3)
    made = sampler(vocab, *(admit(slot, index=slot) for slot in range(8)))
    got = sample(made, row.expand(8, vocab), list(range(8)), [5] * 8)
    assert got == [reference(row[0].tolist(), admit(0, index=slot), 5) for slot in range(8)]
    assert len(set(got)) > 1


@pytest.mark.parametrize("p", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_frequencies_follow_the_probabilities(p: dict[str, Any]) -> None:
    """Chi-square over 20,000 positions of fixed seeds; 35 is beyond the 0.9999 quantile for 9 degrees of freedom."""
    vocab, draws = 10, 20_000
    row = random_logits(1, vocab, 4, 1.0)
    u = uniforms(np.full(draws, stream_key(99, 1), np.uint64), np.arange(draws))
    a = admit(**p)
    x = row[0].double() / a.params.temperature
    probs = torch.softmax(x, 0)
    order = x.argsort(descending=True)
    if a.params.top_k:
        probs[order[a.params.top_k :]] = 0
    if a.params.min_p:
        probs[probs < a.params.min_p * probs.max()] = 0
    if a.params.top_p < 1:
        probs[order[1:][probs[order].cumsum(0)[:-1] >= a.params.top_p]] = 0
    expected = (probs / probs.sum() * draws).numpy()

    def column(value: float, dtype: Any = torch.float64) -> torch.Tensor:
        return torch.full((draws, 1), value, dtype=dtype)

    shape = Shape(
        column(a.params.temperature),
        column(a.params.min_p),
        column(a.params.top_k or vocab, torch.int64),
        column(a.params.top_p),
        torch.from_numpy(u)[:, None],
    )
    got = np.bincount(choose(row.expand(draws, vocab), shape).numpy(), minlength=vocab)
    assert got[expected == 0].sum() == 0
    some = expected > 0
    assert ((got[some] - expected[some]) ** 2 / expected[some]).sum() < 35


def test_positions_and_samples_are_independent() -> None:
    """Pairs of neighbouring positions, of samples and of seeds fill a 10 x 10 grid evenly (99 degrees of freedom)."""
    draws = 20_000
    positions = np.arange(draws)
    base = uniforms(np.full(draws, stream_key(5, 0), np.uint64), positions)
    keys = np.array([stream_key(seed, 0) for seed in range(draws)], np.uint64)
    pairs = {
        "position": (base[:-1], base[1:]),
        "sample": (base, uniforms(np.full(draws, stream_key(5, 1), np.uint64), positions)),
        "seed": (base, uniforms(np.full(draws, stream_key(6, 0), np.uint64), positions)),
        "neighbouring seeds": (uniforms(keys, positions * 0)[:-1], uniforms(keys, positions * 0)[1:]),
    }
    for name, (one, other) in pairs.items():
        grid = np.histogram2d(one, other, bins=10, range=((0, 1), (0, 1)))[0]
        mean = len(one) / 100
        assert ((grid - mean) ** 2 / mean).sum() < 165, name


# transformers' processors


@pytest.mark.parametrize("seed", range(5))
def test_kept_tokens_are_transformers(seed: int) -> None:
    """With u swept over [0, 1) the drawn tokens are exactly those that transformers leaves a finite score."""
    vocab, sweep = 40, 20_000
    row = random_logits(1, vocab, seed, 2.0)
    u = torch.arange(sweep, dtype=torch.float64)[:, None] / sweep

    def drawn(top_k: int = vocab, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
        columns = [torch.full((sweep, 1), x, dtype=torch.float64) for x in (1.0, min_p, top_p)]
        k = torch.full((sweep, 1), top_k)
        return set(choose(row.expand(sweep, vocab), Shape(columns[0], columns[1], k, columns[2], u)).tolist())

    def kept(*warpers: Any) -> set[int]:
        scores, ids = row.clone(), torch.zeros(1, 1, dtype=torch.long)
        for warper in warpers:
            scores = warper(ids, scores)
        # those too unlikely for the sweep's grid can't be seen
        return set((torch.softmax(scores, 1)[0] > 2 / sweep).nonzero().flatten().tolist())

    for k in (1, 3, 17):
        assert drawn(top_k=k) == kept(TopKLogitsWarper(k))
    for p in (0.3, 0.85):
        assert drawn(top_p=p) == kept(TopPLogitsWarper(p))
    for m in (0.02, 0.3):
        assert drawn(min_p=m) == kept(MinPLogitsWarper(m))
    assert drawn(12, 0.6, 0.05) == kept(MinPLogitsWarper(0.05), TopKLogitsWarper(12), TopPLogitsWarper(0.6))


@pytest.mark.parametrize("penalty", [0.4, 1.0, 1.7])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    vocab, outputs = 30, (7, 7, 9)
    logits = random_logits(64, vocab, 5, 1.0)
    ids = torch.tensor([[*PROMPT, *outputs]] * 64)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()).argmax(1).tolist()
    p = {"temperature": 0, "repetition_penalty": penalty}
    admits = [admit(slot, outputs=outputs, **p) for slot in range(64)]
    assert sample(sampler(vocab, *admits), logits, list(range(64)), [8] * 64) == expected


# penalties, masks and bias by hand


def test_presence_and_frequency_count_outputs_only() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 3], logits[0, 6] = 1.0, 0.9
    # 3 stands in the prompt, which counts for nothing
    assert sample(sampler(8, admit(temperature=0, presence_penalty=0.5)), logits, [0], [5]) == [3]
    assert sample(sampler(8, admit(temperature=0, presence_penalty=0.5, outputs=(3,))), logits, [0], [6]) == [6]
    made = sampler(8, admit(temperature=0, frequency_penalty=0.03))
    # 1.0, .97, .94, .91 against .9, .87: each choice makes itself a little less likely
    assert [sample(made, logits, [0], [5 + i])[0] for i in range(6)] == [3, 3, 3, 3, 6, 3]


def test_a_readmitted_sequence_goes_on_as_if_it_had_stayed() -> None:
    vocab = 20
    p: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 6, "stop_token_ids": (2,)}
    rows = random_logits(12, vocab, 6)
    stayed, outputs = sampler(vocab, admit(**p)), []
    for step in range(12):
        outputs += sample(stayed, rows[step : step + 1], [0], [5 + step])
    for cut in (1, 6, 11):
        back = sampler(vocab, admit(1, temperature=0), admit(0, outputs=tuple(outputs[:cut]), **p))
        again = [sample(back, rows[step : step + 1], [0], [5 + step])[0] for step in range(cut, 12)]
        assert again == outputs[cut:]


def test_a_recycled_slot_equals_a_fresh_one() -> None:
    vocab = 20
    rows = random_logits(1, vocab, 7)
    dirty = admit(repetition_penalty=2.0, logit_bias={1: 50.0}, min_tokens=9, stop_token_ids=(4,), top_k=1, logprobs=3)
    for clean in (admit(), admit(temperature=0), admit(frequency_penalty=1.0, outputs=(9,)), admit(top_p=0.5)):
        made = sampler(vocab, dirty)
        made.sample(rows, array("i", [0]), array("i", [5]))
        made.admit(clean)
        assert made.sample(rows, array("i", [0]), array("i", [8])) == sampler(vocab, clean).sample(
            rows, array("i", [0]), array("i", [8])
        )


def test_min_tokens_masks_stop_and_end_ids_until_reached() -> None:
    logits = torch.arange(8, dtype=torch.float32)[None]
    made = sampler(8, admit(temperature=0, min_tokens=2, stop_token_ids=(7,), eos=(6, 99)))
    assert [sample(made, logits, [0], [5 + i])[0] for i in range(4)] == [5, 5, 7, 7]
    none = sampler(8, admit(temperature=0, min_tokens=2))
    assert sample(none, logits, [0], [5]) == [7]


def test_bias_adds() -> None:
    logits = torch.arange(8, dtype=torch.float32)[None]
    assert sample(sampler(8, admit(temperature=0, logit_bias={2: 5.5})), logits, [0], [5]) == [2]
    assert sample(sampler(8, admit(logit_bias={2: 100.0})), logits, [0], [5]) == [2]


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, 5000)
    logits[:, [77, 4000, 4999]] = 1.0
    made = sampler(5000, admit(0, temperature=0), admit(1, top_k=1), admit(2, top_p=1e-9))
    assert sample(made, logits, [0, 1, 2], [5, 5, 5]) == [77, 77, 77]
    equal = torch.zeros(1, 5000)
    for k in (1, 2, 1024, 1025, 4999, 5000):
        assert best(equal, k)[1].tolist() == [list(range(k))]
    signed = torch.tensor([[-0.0, 0.0, -1.0, 0.0]])
    assert best(signed, 3)[1].tolist() == [[0, 1, 3]]


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-1024, 1024, width=32) | st.sampled_from([-math.inf, 0.0, -0.0, 1.0]), min_size=1),
    data=st.data(),
)
def test_best_is_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    got, ids = best(torch.tensor([values], dtype=torch.float32), k)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert ids.tolist() == [order]
    assert got.tolist() == [[values[i] for i in order]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "p",
    [
        {"temperature": 0},
        {},
        {"top_k": 3},
        {"logit_bias": {4: -100.0}, "logprobs": 2},
        {"min_tokens": 3, "stop_token_ids": (4,)},
    ],
)
def test_a_row_that_is_not_finite_fails_alone(bad: float, p: dict[str, Any]) -> None:
    vocab = 10
    logits = random_logits(3, vocab, 8)
    expected = sample(sampler(vocab, *(admit(i, **p) for i in range(3))), logits, [0, 1, 2], [5, 5, 5])
    logits[1, 4] = bad
    made = sampler(vocab, *(admit(i, **p) for i in range(3)))
    tokens, logprobs = made.sample(logits, array("i", [0, 1, 2]), array("i", [5, 5, 5]))
    assert tokens.tolist() == [expected[0], -1, expected[2]]
    assert sorted(logprobs) == ([0, 2] if "logprobs" in p else [])


def test_a_failed_row_is_not_counted() -> None:
    made = sampler(8, admit(temperature=0, min_tokens=1, stop_token_ids=(7,), frequency_penalty=2.0))
    assert sample(made, torch.full((1, 8), math.nan), [0], [5]) == [-1]
    logits = torch.arange(8, dtype=torch.float32)[None]
    assert [sample(made, logits, [0], [5 + i])[0] for i in range(2)] == [6, 7]


def test_a_row_with_every_token_masked_fails() -> None:
    for p in ({"temperature": 0}, {}, {"top_p": 0.5}):
        made = sampler(4, admit(min_tokens=1, stop_token_ids=(0, 1, 2, 3), **p))
        assert sample(made, torch.zeros(1, 4), [0], [5]) == [-1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 0.01])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(20, 50, 9)
    made = sampler(50, *(admit(i, temperature=temperature) for i in range(20)))
    assert sample(made, logits, list(range(20)), [5] * 20) == logits.argmax(1).tolist()


def test_a_token_of_no_weight_is_never_drawn() -> None:
    weights = torch.tensor([[0.0, 0.0, 1.0, 0.0, 3.0, 0.0]], dtype=torch.float64)
    for u, token in ((0.0, 2), (0.25 - 2**-53, 2), (0.25, 4), (1 - 2**-53, 4)):
        assert draw._draw(weights, torch.tensor([[u]], dtype=torch.float64)).tolist() == [[token]]


def test_an_unfilled_seed_is_a_programmers_error() -> None:
    with pytest.raises(ValueError, match="seed is not filled in"):
        sampler(8, admit(seed=None))


# log probabilities


def test_logprobs_are_of_the_unmodified_logits() -> None:
    vocab = 200
    logits = random_logits(4, vocab, 10)
    logits[3, [5, 50, 150]] = logits[3].max() + 1
    heavy: dict[str, Any] = {"temperature": 3.0, "logit_bias": {9: 5.0}, "repetition_penalty": 2.0, "top_k": 50}
    made = sampler(
        vocab,
        admit(0, logprobs=0, **heavy),
        admit(1, logprobs=20, **heavy),
        admit(2),
        admit(3, logprobs=2, temperature=0),
    )
    tokens, found = made.sample(logits, array("i", [0, 1, 2, 3]), array("i", [5] * 4))
    expected = torch.log_softmax(logits.double(), 1)
    assert sorted(found) == [0, 1, 3]
    for entry, count in ((0, 0), (1, 20), (3, 2)):
        token, row = tokens[entry], expected[entry].tolist()
        order = sorted(range(vocab), key=lambda i: (-logits[entry, i].item(), i))
        assert found[entry].logprob == pytest.approx(row[token], abs=1e-12)
        assert found[entry].rank == order.index(token) + 1
        assert [token for token, _ in found[entry].top] == order[:count]
        assert [value for _, value in found[entry].top] == pytest.approx([row[i] for i in order[:count]], abs=1e-12)
    assert (tokens[3], found[3].rank, [i for i, _ in found[3].top]) == (5, 1, [5, 50])


def test_scores_of_prompt_tokens() -> None:
    vocab = 30
    logits = random_logits(5, vocab, 11)
    admits = admit(0, prompt_logprobs=2), admit(1, prompt_logprobs=0, logprobs=7)
    made = sampler(vocab, *admits)
    tokens, slots = array("i", [3, 29, 0, 7, 8]), array("i", [0, 1, 0, 1, 0])
    expected = torch.log_softmax(logits.double(), 1)
    whole = made.score(logits, tokens, slots)
    assert [len(each.top) for each in whole] == [2, 0, 2, 0, 2]
    for row, each in enumerate(whole):
        assert each.logprob == pytest.approx(expected[row, tokens[row]].item(), abs=1e-12)
        assert each.rank == int((logits[row] > logits[row, tokens[row]]).sum()) + 1
    assert sampler(vocab, *admits, chunk=2 * vocab).score(logits, tokens, slots) == whole
    assert made.score(logits[:0], array("i"), array("i")) == []


def test_equal_logits_rank_by_id() -> None:
    made = sampler(6, admit(0, prompt_logprobs=3))
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 1.0]])
    scores = [made.score(logits, array("i", [token]), array("i", [0]))[0] for token in range(6)]
    assert [each.rank for each in scores] == [6, 1, 4, 2, 3, 5]
    assert [token for token, _ in scores[0].top] == [1, 3, 4]


def test_more_logprobs_than_tokens() -> None:
    _, found = sampler(4, admit(logprobs=20)).sample(torch.zeros(1, 4), array("i", [0]), array("i", [5]))
    assert found[0].top == tuple((i, pytest.approx(-math.log(4))) for i in range(4))


def test_an_empty_call() -> None:
    assert sampler(4, admit()).sample(torch.zeros(0, 4), array("i"), array("i")) == (array("i"), {})
