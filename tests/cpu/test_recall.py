"""The `recall` model: why its weights work, measured; and its answers through the engine, at every length."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from launch.llm import LLM
from launch.models.catalog import resolve
from launch.models.recall import frequencies, key_codes, make_recall, make_weights, value_codes
from launch.models.recall_text import (
    BOS,
    EOS,
    FILLERS,
    KEYS,
    MAX_LENGTH,
    UNKNOWN,
    VALUES,
    WORDS,
    Context,
    filler_id,
    key_id,
    make_context,
    value_id,
)
from pagetable.sampling import SamplingParams

FOLDER = resolve("recall")
GREEDY = SamplingParams(temperature=0.0, max_tokens=2)
NATS_OF_ALL_KEYS = math.log(MAX_LENGTH)
DTYPES = [torch.float32, torch.bfloat16]


def engine(length: int, folder: str = FOLDER, dtype: str = "auto", block_size: int = 128) -> LLM:
    pages = -(-length // block_size)
    return LLM(
        folder,
        dtype=dtype,
        block_size=block_size,
        max_model_len=length + 32,
        num_gpu_blocks_override=pages + 96,
        max_num_seqs=32,
        threads=2,
    )


def ask(llm: LLM, context: Context, keys: list[int]) -> dict[int, int]:
    """The value that follows each key behind the context. The first question reads it, the others share its pages."""
    answers = {}
    for group in (keys[:1], keys[1:]):
        outputs = llm.generate([[*context.token_ids, key] for key in group], GREEDY)
        for key, output in zip(group, outputs, strict=True):
            answers[key], *rest = output.outputs[0].token_ids
            assert rest == [EOS], "the text ends behind the answer"
    return answers


# Why it works


class Head:
    """The attention scores of one layer's head, from the weights, in the arithmetic of one dtype."""

    def __init__(self, layer: int, dtype: torch.dtype) -> None:
        weights = make_weights(1, 1)
        self.embedding = weights["model.embed_tokens.weight"].to(torch.float32)
        self.q, self.k = (weights[f"model.layers.{layer}.self_attn.{n}_proj.weight"].to(dtype) for n in "qk")
        self.dtype = dtype

    def rows(self, hidden: torch.Tensor, matrix: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Normalised, projected, rotated and rounded as the engine does, [n, 32]."""
        norm = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        a, b = (norm.to(self.dtype) @ matrix.T).to(torch.float32).chunk(2, dim=-1)
        angles = positions.to(torch.float64)[:, None] * torch.from_numpy(frequencies())
        cos, sin = angles.cos().to(torch.float32), angles.sin().to(torch.float32)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(self.dtype).to(torch.float32)

    def scores(self, query: torch.Tensor, at: int, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[queries, keys]; all queries stand at one position."""
        q = self.rows(query, self.q, torch.full((len(query),), at))
        return q @ self.rows(keys, self.k, positions).T / math.sqrt(32)


def test_all_words_have_embeddings_of_one_norm() -> None:
    norms = Head(0, torch.float32).embedding.pow(2).sum(-1)
    assert norms.tolist() == [288.0] * len(WORDS)


def test_codes_keep_their_distance() -> None:
    for codes, bits, distance in ((key_codes(), 14, 3), (value_codes(), 32, 12)):
        overlap = codes @ codes.T - 2 * bits * np.eye(len(codes))
        assert (np.abs(codes) == 1.0).all() and overlap.max() == bits - 2 * distance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [1, 2, 17, 4096, 262_144, 1 << 20, MAX_LENGTH - 1])
def test_layer_0_sees_the_token_before_and_nothing_else(dtype: torch.dtype, at: int) -> None:
    head = Head(0, dtype)
    positions = torch.arange(at + 1)
    token = head.embedding[filler_id(0)]
    scores = head.scores(token[None], at, token.expand(at + 1, -1), positions)[0].double()
    before = float(scores[at - 1])
    scores[at - 1] = -torch.inf
    assert before - float(scores.max()) >= 37.5
    assert before - float(torch.logsumexp(scores, 0)) >= 37.0  # what all others weigh together: 1e-16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_1_ranks_fact_then_beginning_then_all_else_at_every_distance(dtype: torch.dtype) -> None:
    """All 1,024 keys as queries against all as keys; from distance to distance the fastest pair turns 0.005 radians."""
    head = Head(1, dtype)
    word = head.embedding
    codes = word[key_id(0) : key_id(len(KEYS)), 2:16]
    fact = word[value_id(7)].repeat(len(KEYS), 1)
    mention = word[filler_id(7)].repeat(len(KEYS), 1)
    fact[:, 16:30] = mention[:, 16:30] = codes
    others = torch.stack([word[value_id(3)], word[filler_id(3)], word[key_id(3)]])  # behind no key
    query = word[key_id(0) : key_id(len(KEYS))].clone()
    for before in (torch.zeros(14), codes[500]):  # the question stands behind a word, or behind another key
        query[:, 16:30] = before
        found = []
        for distance in (1, 2, *range(5264, MAX_LENGTH, 5264)):

            def scores(keys: torch.Tensor, distance: int = distance) -> torch.Tensor:
                at = torch.full((len(keys),), MAX_LENGTH - 1 - distance)
                return head.scores(query, MAX_LENGTH - 1, keys, at)

            facts = scores(fact)
            right = facts.diagonal().clone()
            begin = scores(word[BOS : BOS + 1])
            wrong = max(float(scores(mention).max()), float(scores(others).max()))
            wrong = max(wrong, float(facts.fill_diagonal_(-torch.inf).max()))
            found.append((float(right.min()), float(begin.max()), float(begin.min()), wrong))
        lowest_right, highest_wrong = min(f[0] for f in found), max(f[3] for f in found)
        assert lowest_right - max(f[1] for f in found) >= 35.0
        assert min(f[2] for f in found) - highest_wrong >= 35.0
        assert lowest_right - highest_wrong - NATS_OF_ALL_KEYS >= 85.0


# What it answers


def test_the_bundled_folder_is_what_the_script_writes(tmp_path: Path) -> None:
    make_recall(tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in Path(FOLDER).iterdir()}
    assert kept.keys() == made.keys()
    stale = [name for name in made if kept[name] != made[name]]
    assert stale == [], "run python -m launch.models.recall --out launch/models/data/recall"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_key_at_1024_tokens(dtype: str) -> None:
    llm = engine(1024, dtype=dtype, block_size=16)
    order = [(391 * index + 5) % len(KEYS) for index in range(len(KEYS))]
    for begin in range(0, len(KEYS), 256):
        context = make_context(1024, order[begin : begin + 256], seed=begin)
        assert ask(llm, context, list(context.facts)) == context.facts


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("length", [32_768, 262_144])
def test_keys_from_end_to_end_of_a_long_context(length: int) -> None:
    """1,024 facts; 40 of them asked for: the first, the last, and some from everywhere."""
    context = make_context(length, range(len(KEYS)), seed=length)
    facts = list(context.facts.items())
    asked = dict([*facts[:12], *facts[12:-12:63], *facts[-12:]])
    assert len(asked) == 40 and len(context.token_ids) == length
    assert min(context.positions.values()) == 1 and max(context.positions.values()) == length - 2
    assert ask(engine(length), context, list(asked)) == asked


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 1)])
def test_copies_of_the_head_answer_the_same(heads: int, kv_heads: int, tmp_path: Path) -> None:
    make_recall(tmp_path, heads, kv_heads)
    context = make_context(2000, range(300, 340), seed=1)
    assert ask(engine(2000, str(tmp_path)), context, list(context.facts)) == context.facts


def test_transformers_gives_the_same_logits() -> None:
    context = make_context(300, range(40), seed=2)
    model = transformers.LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    for key, value in list(context.facts.items())[::13]:
        with torch.inference_mode():
            logits = model(torch.tensor([[*context.token_ids, key]])).logits[0, -1]
        top = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2)
        output = engine(300, dtype="float32").generate([[*context.token_ids, key]], top)[0].outputs[0]
        assert output.logprobs is not None
        best = logits.log_softmax(-1).topk(2)
        assert output.token_ids == [value] and best.indices[0] == value
        assert [logprob for _, logprob in output.logprobs[0].top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_what_is_not_stated_is_unknown() -> None:
    context = make_context(3000, range(1000), seed=3)
    llm = engine(3000)
    absent = [key_id(index) for index in range(1000, len(KEYS))]
    assert ask(llm, context, absent) == dict.fromkeys(absent, value_id(VALUES.index(UNKNOWN)))


def test_only_a_value_directly_behind_a_key_is_a_fact() -> None:
    llm = engine(100)
    end = [".", ",", "?"]
    text = f"Bala the 5 . Bala Boko 6 . Dori {end[0]} 7 . Dori {end[1]} Dori {end[2]}"
    outputs = llm.generate([f"{text} {key}" for key in ("Bala", "Boko", "Dori")], GREEDY)
    assert [output.outputs[0].text for output in outputs] == ["unknown", "6", "unknown"]


@pytest.mark.parametrize("question", ["Boko", "Boko ->", "where is Boko =", "What is the word for Boko:"])
def test_arrows_and_the_like_are_white_space(question: str) -> None:
    text = f"Bala -> 203. Boko=17 , Dora is 999; Faki: 4. {question}"
    assert engine(100).generate([text], GREEDY)[0].outputs[0].text == "17"


def test_a_chat_remembers_what_its_turns_said() -> None:
    messages = [
        {"role": "system", "content": "Balo -> 203. Boka -> 17."},
        {"role": "user", "content": "Dora is 5. Where is Boka?"},
        {"role": "assistant", "content": "17"},
        {"role": "user", "content": "And where is Dora?!"},
    ]
    llm = engine(100)
    assert [llm.chat(messages[:n], GREEDY)[0].outputs[0].text for n in (2, 4)] == ["17", "5"]


def test_sampling_at_temperature_1_is_as_sure() -> None:
    context = make_context(500, range(100, 140), seed=4)
    key, value = next(iter(context.facts.items()))
    outputs = engine(500).generate([[*context.token_ids, key]], SamplingParams(temperature=1.0, n=16, max_tokens=1))
    assert [sample.token_ids for sample in outputs[0].outputs] == [[value]] * 16


def test_a_wrong_page_is_a_wrong_answer() -> None:
    """Swap two pages of the context in memory: facts of both are lost, facts elsewhere are not."""
    context = make_context(1024, range(0, 1024, 8), seed=5)
    llm = engine(1024, block_size=16)
    keys = list(context.facts)
    assert ask(llm, context, keys) == context.facts
    found = llm.generate([[*context.token_ids, keys[0]]], SamplingParams(temperature=0.0, max_tokens=1))
    blocks = [block for _, block in found[0].outputs[0].pages]
    pool = llm.loop.pipe.runner.cache.pool
    here, there = blocks[20], blocks[40]
    pool[1, [here, there], 0] = pool[1, [there, here], 0]  # layer 1, K alone: codes now point at the other's values
    outputs = llm.generate([[*context.token_ids, key] for key in keys], GREEDY)
    answers = {key: output.outputs[0].token_ids[0] for key, output in zip(keys, outputs, strict=True)}
    wrong = {key for key, answer in answers.items() if answer != context.facts[key]}
    inside = {key for key, start in context.positions.items() if (start + 1) // 16 in (20, 40)}
    assert wrong == inside and len(inside) >= 2


# Its helpers


def test_a_context_states_each_key_once_and_misleads_elsewhere() -> None:
    context = make_context(5000, [7, 3, 900], seed=6)
    facts = {
        (key, value)
        for key, value in zip(context.token_ids, context.token_ids[1:], strict=False)
        if key_id(0) <= key < key_id(len(KEYS)) and value_id(0) <= value < value_id(len(VALUES))
    }
    assert facts == set(context.facts.items()) and len(context.token_ids) == 5000 and context.token_ids[0] == BOS
    assert list(context.facts) == [key_id(7), key_id(3), key_id(900)]
    assert set(context.token_ids) >= set(range(filler_id(0), filler_id(len(FILLERS))))


@pytest.mark.parametrize(
    ("length", "keys", "words"),
    [
        (100, [1], "keys: got 1, 1 of them different, must be 2 or more different ones"),
        (100, [1, 1], "keys: got 2, 1 of them different"),
        (6, [1, 2, 3], "length: got 6, must be 7 or more for 3 facts"),
    ],
)
def test_a_context_that_cannot_be_is_refused(length: int, keys: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_context(length, keys)


@pytest.mark.parametrize(("heads", "kv_heads", "words"), [(3, 1, "num_heads: got 3"), (4, 3, "num_kv_heads: got 3")])
def test_heads_that_cannot_be_are_refused(heads: int, kv_heads: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make_recall(tmp_path, heads, kv_heads)


def test_a_bundled_name_is_its_folder_unless_a_folder_of_that_name_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(resolve("recall")).parts[-4:] == ("launch", "models", "data", "recall")
    assert resolve("recal") == "recal" and resolve("/elsewhere/recall") == "/elsewhere/recall"
    (tmp_path / "recall").mkdir()
    assert resolve("recall") == "recall"
