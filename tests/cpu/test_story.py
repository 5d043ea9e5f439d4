"""The `story` model: its grammar's probabilities, and the trained folder measured against them through the engine."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from launch.llm import LLM
from launch.models.catalog import resolve
from launch.models.story import BOS, CONTEXT, EOS, UNK, WORDS, encode, initial, loss, write
from launch.models.story_grammar import END, MAX_EPISODES, POOLS, RULES, log_probability, sample
from pagetable.sampling import SamplingParams

FOLDER = resolve("story")
UNSEEN_SEED = 2_000_003  # neither training nor its own evaluation draws from it


def engine() -> LLM:
    return LLM(FOLDER, num_gpu_blocks_override=2048, max_num_seqs=32, threads=2)


def stories(count: int, seed: int) -> list[tuple[list[str], float]]:
    rng = Random(seed)
    return [sample(rng) for _ in range(count)]


def as_text(story: list[str]) -> str:
    return " ".join(story).replace(" .", ".").replace(" ,", ",").removesuffix(f" {END}")


def as_story(text: str) -> list[str]:
    return text.replace(".", " .").replace(",", " ,").split()


# The grammar


def test_a_text_has_the_probability_of_its_one_derivation() -> None:
    for story, log_share in stories(300, seed=1):
        assert log_probability(story) == pytest.approx(log_share, abs=1e-9)


def test_the_probability_of_a_text_is_the_product_of_its_choices() -> None:
    text = (
        "Long ago a kind girl named Mira lived near the hill . On her birthday she got a red kite , and the kite was "
        "the best of all . Her best friend was a big dog . On a sunny day they set out for the lake . At the lake they "
        "sang and danced under a tree . And she never lost the red kite again . The end . </s>"
    )
    opening = [2 / 3, 1 / 4, 1 / 8, 1 / 2, 1 / 10, 1 / 12]  # no request, template, trait, child, name, home
    belongings = [1 / 3, 1 / 8, 1 / 12, 1 / 3, 1 / 6, 1 / 10]  # template, colour, thing, template, size, animal
    # no closing sentence, template, weather, time, goal (not the home again), play, template, two deeds, where, spot
    episode = [1 / 3, 1 / 4, 1 / 6, 1 / 5, 1 / 11, 1 / 5, 1 / 3, 1 / 8, 1 / 8, 1 / 4, 1 / 8]
    ending = [2 / 5, 1 / 4]
    found = log_probability(text.split())
    assert found == pytest.approx(math.log(math.prod(opening + belongings + episode + ending)), abs=1e-9)


@pytest.mark.parametrize(
    ("change", "to"), [("Her", "His"), ("Mira", "Nora"), ("kite", "lamp"), ("The end .", "The end"), ("hill", "hero")]
)
def test_a_text_that_contradicts_itself_has_no_probability(change: str, to: str) -> None:
    text = (
        "Once upon a time there was a kind girl named Mira . On her birthday she got a red kite , and the kite was "
        "the best of all . Her best friend was a big dog . On a sunny day they set out for the hill . At the hill they "
        "sang and danced under a tree . That night Mira dreamed of the hill . And she never lost the "
        "red kite again . The end . </s>"
    )
    assert log_probability(text.split()) is not None
    at = text.rindex(change)
    assert log_probability((text[:at] + to + text[at + len(change) :]).split()) is None


def test_the_longest_text_fits_the_context() -> None:
    @cache
    def longest(symbol: str) -> int:
        if symbol == "^":
            return 0
        if symbol[0] != "@":
            return 1
        if symbol == "@more":
            return (MAX_EPISODES - 1) * longest("@episode") + longest("@ending") + 4
        return max(sum(map(longest, template)) for _, template in RULES[symbol[1:]])

    assert 500 < 1 + longest("@text") <= CONTEXT


# Training


def test_the_loss_of_untrained_weights_counts_every_token_once() -> None:
    weights = {name: tensor * 0 if name == "lm_head.weight" else tensor for name, tensor in initial(1).items()}
    short, long = encode(["Tell", "me", ".", END]), encode(["Tell", "me", "a", "story", ".", END])
    rows = torch.tensor([short + [EOS] * 2, long])
    total, count = loss(weights, rows)
    assert count == 4 + 6
    assert float(total) == pytest.approx(10 * math.log(len(WORDS)), rel=1e-5)


def test_the_script_makes_a_folder_that_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.models.story", "--steps", "2", "--out", str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "held out: loss" in done.stdout
    llm = LLM(str(tmp_path / "made"), num_gpu_blocks_override=64, threads=2)
    assert len(llm.generate("Long ago", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3


# The trained folder


def test_the_bundled_files_are_what_the_script_writes_around_the_weights(tmp_path: Path) -> None:
    write(tmp_path, load_file(Path(FOLDER) / "model.safetensors"))
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in Path(FOLDER).iterdir()}
    assert [name for name in made if kept.get(name) != made[name]] == [] and kept.keys() == made.keys()


def test_the_weights_are_small_bfloat16() -> None:
    weights = load_file(Path(FOLDER) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in initial(1).items()}
    assert sum(tensor.numel() for tensor in weights.values()) <= 2_000_000


def test_the_loss_on_unseen_stories_is_within_15_percent_of_the_grammars_entropy() -> None:
    drawn = stories(120, UNSEEN_SEED)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = engine().generate([encode(story) for story, _ in drawn], params)
    total, tokens = 0.0, 0
    for output, (story, _) in zip(outputs, drawn, strict=True):
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        scores = [each.logprob for each in output.prompt_logprobs[1:] if each is not None]
        assert len(scores) == len(story)
        total, tokens = total - sum(scores), tokens + len(scores)
    entropy = -sum(log_share for _, log_share in drawn)
    print(f"{tokens} tokens: loss {total / tokens:.4f}, entropy {entropy / tokens:.4f}, {total / entropy - 1:+.1%}")
    assert entropy < total < 1.15 * entropy


def shapes(story: list[str]) -> list[tuple[frozenset[str], ...]]:
    """Each sentence as the pools that its words are in (a word of no pool is itself)."""
    found: list[list[frozenset[str]]] = [[]]
    for word in story:
        pools = frozenset(name for name, pool in POOLS.items() if word in pool or word.lower() in pool)
        found[-1].append(pools or frozenset({word}))
        if word == ".":
            found.append([])
    return [tuple(sentence) for sentence in found if sentence]


def test_what_it_writes_are_sentences_and_most_stories_are_of_the_grammar() -> None:
    params = SamplingParams(temperature=0.7, max_tokens=900, seed=1, n=8)
    prompts = ["Once upon a time", "Long ago", "Tell me a story.", "In a house by the river"]
    samples = [sample for output in engine().generate(prompts, params) for sample in output.outputs]
    texts = [f"{prompts[index // 8]} {sample.text}" for index, sample in enumerate(samples)]
    assert all(sample.finish_reason == "stop" and sample.token_ids[-1] == EOS for sample in samples)
    assert not any(UNK in sample.token_ids or BOS in sample.token_ids for sample in samples)
    known = {shape for story, _ in stories(4000, seed=3) for shape in shapes(story)}
    written = [shape for text in texts for shape in shapes(as_story(text))]
    whole = [log_probability([*as_story(text), END]) is not None for text in texts]
    print(f"{sum(s in known for s in written)} of {len(written)} sentences, {sum(whole)} of {len(whole)} stories")
    assert len(written) > 300 and sum(shape in known for shape in written) >= 0.97 * len(written)
    assert sum(whole) >= 0.5 * len(whole)


def test_a_chat_gets_the_story_that_it_asked_for() -> None:
    messages = [{"role": "user", "content": "Tell me a story about a girl named Mira."}]
    output = engine().chat(messages, SamplingParams(temperature=0.0, max_tokens=900))[0].outputs[0]
    assert "girl" in output.text and "Mira" in output.text and output.text.endswith("The end.")


def test_the_tokenizer_gives_texts_back() -> None:
    tokenizer = engine().tokenizer
    assert tokenizer is not None
    for story, _ in stories(50, seed=4):
        ids = tokenizer.encode(as_text(story))
        assert ids == encode(story)[:-1]
        assert tokenizer.decode(ids) == as_text(story)
