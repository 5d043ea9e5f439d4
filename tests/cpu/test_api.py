"""The Python API on a tiny model: what comes back, when it comes, and what is left behind (nothing)."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import quire
from launch.models.tiny_llama import END, make_tiny_llama
from pagetable.errors import AlreadyExists, ConfigError, InvalidRequest, NotFound
from quire import LLM, EngineConfig, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
TEXTS = ["Once upon a time", "The memory of a machine", "Why copy a page that two people read?"]
SETTINGS: dict[str, Any] = {"num_gpu_blocks_override": 64, "max_num_seqs": 16, "threads": 1}
VOCAB = 502


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    return str(folder)


@pytest.fixture
def llm(model: str) -> Iterator[LLM]:
    """An engine, in which nothing may be left after the test."""
    found = LLM(model, **SETTINGS)
    yield found
    assert_empty(found)


def assert_empty(llm: LLM) -> None:
    scheduler = llm.loop.scheduler
    assert not llm.loop.has_work and llm._collectors == {}
    assert (scheduler.pool.num_used, scheduler.pool.num_retiring) == (0, 0)
    scheduler.check()


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def with_changes(**changes: Any) -> SamplingParams:
    return dataclasses.replace(GREEDY, **changes)


def ids(llm: LLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text)


def only(allowed: list[int]) -> dict[int, float]:
    """Biases that leave only these tokens."""
    return {token: -100.0 for token in range(VOCAB) if token not in allowed}


# generate and chat


def test_a_prompt_may_be_text_ids_or_a_mapping_alone_or_in_a_list(llm: LLM) -> None:
    [text, other, _] = TEXTS
    alone = llm.generate(text, GREEDY)
    assert [(o.prompt, o.prompt_token_ids, o.finished) for o in alone] == [(text, tuple(ids(llm, text)), True)]
    wanted = tokens(alone)
    assert len(wanted[0]) == 8
    for prompt in (ids(llm, text), tuple(ids(llm, text)), {"prompt": text}, {"prompt_token_ids": ids(llm, text)}):
        assert tokens(llm.generate(prompt, GREEDY)) == wanted
        both = llm.generate([prompt, other], GREEDY)
        assert tokens(both)[:1] == wanted and both[1].prompt == other
        assert both[0].prompt == (text if isinstance(prompt, dict) and "prompt" in prompt else None)
    salted = llm.generate([{"prompt": text, "cache_salt": "mine"}], GREEDY)
    assert tokens(salted) == wanted and salted[0].num_cached_tokens == 0
    assert llm.generate([], GREEDY) == []


def test_outputs_come_in_the_order_of_the_prompts_with_params_of_their_own(llm: LLM) -> None:
    params = [with_changes(max_tokens=count, n=n) for count, n in ((9, 1), (2, 3), (5, 1))]
    outputs = llm.generate(TEXTS, params)
    assert [o.prompt for o in outputs] == TEXTS
    assert [[len(s.token_ids) for s in o.outputs] for o in outputs] == [[9], [2, 2, 2], [5]]
    assert [[s.index for s in o.outputs] for o in outputs] == [[0], [0, 1, 2], [0]]
    assert len({o.request_id for o in outputs}) == 3
    assert tokens(outputs) == [tokens(llm.generate(text, p))[0] for text, p in zip(TEXTS, params, strict=True)]


def test_as_many_params_as_prompts_or_one(llm: LLM) -> None:
    with pytest.raises(ValueError, match="sampling_params: got 2, must be one, or one for each of the 3 prompts"):
        llm.generate(TEXTS, [GREEDY, GREEDY])


def test_without_params_vllms_defaults_hold_and_the_engines_seed_decides(model: str, llm: LLM) -> None:
    runs = [tokens(LLM(model, seed=seed, **SETTINGS).generate(TEXTS)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert all(1 <= len(each) <= 16 for each in runs[0])
    again = llm.generate([TEXTS[0]] * 2)
    assert tokens(again)[0] != tokens(again)[1], "each request has a seed of its own"


def test_a_refused_request_does_not_change_the_seeds_of_others(model: str) -> None:
    good: dict[str, Any] = {"prompt": TEXTS[0], "max_tokens": 8}
    clean = LLM(model, **SETTINGS).generate_raw([good, good])
    mixed = LLM(model, **SETTINGS).generate_raw([{"prompt": ""}, good, {"n": 99}, good])
    found = [result for result in mixed if isinstance(result, RequestOutput)]
    assert tokens(found) == tokens([result for result in clean if isinstance(result, RequestOutput)])


def test_chat_answers_one_conversation_or_several(llm: LLM) -> None:
    talks = [
        [{"role": "user", "content": "What is a page?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And a book?"}],
    ]
    several = llm.chat(talks, GREEDY)
    assert tokens(several) == [tokens(llm.chat(talk, GREEDY))[0] for talk in talks]
    assert llm.text is not None and llm.text.chat is not None and llm.tokenizer is not None
    for talk, output in zip(talks, several, strict=True):
        rendered = llm.text.chat.render(talk)
        assert rendered.endswith("<|im_start|>assistant\n")
        assert output.prompt_token_ids == tuple(llm.tokenizer.encode(rendered, add_special_tokens=False))
    for bad in ([], [{"role": "user"}], "hi"):
        with pytest.raises(InvalidRequest, match="messages"):
            llm.chat(bad, GREEDY)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "params", "field"),
    [
        ([TEXTS[0], ""], GREEDY, "prompt"),
        ([TEXTS[0], [1, -1]], GREEDY, "prompt_token_ids"),
        ([TEXTS[0], {"prompt": "a", "block_ids": [1]}], GREEDY, "block_ids"),
        (TEXTS[:2], [GREEDY, SamplingParams(top_p=0)], "top_p"),
        (TEXTS[:2], [GREEDY, SamplingParams(stop=("x" * 257,))], "stop"),
        (TEXTS[:2], [GREEDY, SamplingParams(max_tokens=10**6)], "max_tokens"),
    ],
)
def test_what_may_not_be_is_refused_before_anything_runs(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, prompts: Any, params: Any, field: str
) -> None:
    def never() -> None:
        raise AssertionError("a step ran")

    monkeypatch.setattr(llm.loop, "step", never)
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(prompts, params)
    assert caught.value.field == field
    assert_empty(llm)


def test_two_prompts_may_not_have_one_id(llm: LLM) -> None:
    with pytest.raises(AlreadyExists, match="request_id 'x'"):
        llm.generate([{"prompt": "a", "request_id": "x"}, {"prompt": "b", "request_id": "x"}], GREEDY)


@pytest.mark.parametrize("verb", ["generate", "generate_raw", "stream"])
def test_an_interrupted_call_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    step, calls = llm.loop.step, iter([0, 0, 1])

    def interrupted() -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.loop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if verb == "generate":
            llm.generate(TEXTS, GREEDY)
        elif verb == "generate_raw":
            llm.generate_raw([{"prompt": text} for text in TEXTS])
        else:
            list(llm.stream({"prompt": TEXTS[0], "max_tokens": 9, "ignore_eos": True}))
    assert_empty(llm)


def test_a_batch_may_be_longer_than_the_queue(model: str) -> None:
    llm = LLM(model, **SETTINGS | {"max_num_seqs": 4})
    llm.loop.scheduler.config = dataclasses.replace(llm.loop.scheduler.config, max_waiting=3)
    short = with_changes(max_tokens=2)
    wanted = tokens(llm.generate(TEXTS[0], short))
    assert tokens(llm.generate([TEXTS[0]] * 20, short)) == wanted * 20
    raws = [{"prompt": TEXTS[0], "max_tokens": 2, "temperature": 0, "ignore_eos": True}] * 20
    assert tokens([each for each in llm.generate_raw(raws) if isinstance(each, RequestOutput)]) == wanted * 20
    assert_empty(llm)


def test_requests_of_others_go_on_beside_a_batch_and_wait_to_be_taken(llm: LLM) -> None:
    mine = llm.add_request({"prompt": TEXTS[1], "max_tokens": 3, "temperature": 0, "ignore_eos": True})
    long = llm.add_request({"prompt": TEXTS[2], "max_tokens": 200, "temperature": 0, "ignore_eos": True})
    assert len(llm.generate_raw([{"prompt": TEXTS[0], "max_tokens": 8, "ignore_eos": True}])) == 1
    assert llm.pop(mine).outputs[0].token_ids == tokens(llm.generate(TEXTS[1], with_changes(max_tokens=3)))[0]
    with pytest.raises(NotFound, match="no finished output"):
        llm.pop(long)
    assert 8 <= len(llm.abort(long).outputs[0].token_ids) < 200
    for verb in (llm.pop, llm.abort):
        with pytest.raises(NotFound, match=long):
            verb(long)


# streams


def test_a_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    raw = {"prompt": TEXTS[0], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    seen: list[tuple[list[int], str, str | None]] = []
    for output in llm.stream(raw):
        [sample] = output.outputs
        seen.append((list(sample.token_ids), sample.text, sample.finish_reason))
    [whole] = llm.generate(TEXTS[0], with_changes(max_tokens=12))
    assert [len(found) for found, _, _ in seen] == list(range(1, 13))
    assert all(whole.outputs[0].token_ids[: len(found)] == found for found, _, _ in seen)
    assert all(whole.outputs[0].text.startswith(text) for _, text, _ in seen)
    assert seen[-1] == (whole.outputs[0].token_ids, whole.outputs[0].text, "length")
    assert {reason for _, _, reason in seen[:-1]} == {None}


def test_closing_a_stream_aborts_it_and_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream({"prompt": TEXTS[0] * 9, "max_tokens": 100, "ignore_eos": True, "n": 2})
    output = next(stream)
    assert llm.loop.scheduler.pool.num_used > 2
    stream.close()  # type: ignore[attr-defined]
    assert [sample.finish_reason for sample in output.outputs] == ["cancelled"] * 2
    assert_empty(llm)
    never = llm.stream({"prompt": TEXTS[0]})
    never.close()  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match="n: got 99"):
        next(llm.stream({"prompt": TEXTS[0], "n": 99}))


def test_streams_side_by_side_all_see_their_ends(llm: LLM) -> None:
    raws = [{"prompt": t, "max_tokens": 3 + i, "temperature": 0, "ignore_eos": True} for i, t in enumerate(TEXTS)]
    streams = [llm.stream(raw) for raw in raws]
    last: list[tuple[list[int], bool]] = [([], False)] * 3
    while streams:
        for stream in list(streams):
            output = next(stream, None)
            if output is None:
                streams.remove(stream)
                continue
            at = TEXTS.index(output.prompt or "")
            assert not last[at][1] and len(output.outputs[0].token_ids) > len(last[at][0])
            last[at] = (list(output.outputs[0].token_ids), output.finished)
    assert [finished for _, finished in last] == [True] * 3
    assert [len(found) for found, _ in last] == [3, 4, 5]


def test_a_stream_that_somebody_aborts_ends(llm: LLM) -> None:
    stream = llm.stream({"prompt": TEXTS[0], "max_tokens": 100, "ignore_eos": True, "request_id": "mine"})
    output = next(stream)
    llm.abort("mine")
    assert [each.outputs[0].finish_reason for each in stream] == ["cancelled"]
    assert output.outputs[0].finish_reason == "cancelled"


# ends


def letters(llm: LLM) -> dict[int, float]:
    """Biases that leave tokens of letters and spaces only."""
    assert llm.tokenizer is not None
    texts = [llm.tokenizer.decode([token], skip_special_tokens=False) for token in range(VOCAB)]
    return only([token for token, text in enumerate(texts) if text.replace(" ", "a").isalpha() and text.isascii()])


def free_run(llm: LLM) -> tuple[SamplingParams, list[int], str, list[str]]:
    """How it was run, greedy tokens, their text, and the text of each."""
    assert llm.tokenizer is not None
    params = with_changes(max_tokens=40, logit_bias=letters(llm))
    [sample] = llm.generate(TEXTS[0], params)[0].outputs
    pieces = [llm.tokenizer.decode([token]) for token in sample.token_ids]
    assert "".join(pieces) == sample.text
    return params, sample.token_ids, sample.text, pieces


def border(pieces: list[str], text: str) -> tuple[int, str]:
    """(index of a token, a string that ends within its text, began in the one before and is in no earlier text)."""
    for at in range(3, len(pieces)):
        if pieces[at - 1] and len(pieces[at]) > 1:
            stop = pieces[at - 1][-1] + pieces[at][0]
            if text.find(stop) == len("".join(pieces[:at])) - 1:
                return at, stop
    raise AssertionError("the free run has no such place")


def test_a_stop_string_over_a_token_border_ends_the_text_before_it(llm: LLM) -> None:
    params, found, text, pieces = free_run(llm)
    at, stop = border(pieces, text)
    for include in (False, True):
        stopped = dataclasses.replace(params, stop=(stop, "never"), include_stop_str_in_output=include)
        [output] = llm.generate(TEXTS[0], stopped)
        [sample] = output.outputs
        assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
        assert sample.text == text[: text.find(stop) + (len(stop) if include else 0)]
        assert sample.token_ids == found[: at + 1]


def test_what_may_become_a_stop_string_is_held_back_in_a_stream(llm: LLM) -> None:
    params, _, text, pieces = free_run(llm)
    at, stop = border(pieces, text)
    raw = {"prompt": TEXTS[0], "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stop": stop + "\0never"}
    raw["logit_bias"] = params.logit_bias
    held = [output.outputs[0].text for output in llm.stream(raw)]
    assert held[at - 1] == text[: len("".join(pieces[:at])) - 1], "the border's first half waits"
    assert held[-1] == text, "what was held back comes at the end"


def test_min_tokens_holds_off_stop_strings_and_end_tokens(llm: LLM) -> None:
    params, found, text, pieces = free_run(llm)
    at, stop = border(pieces, text)
    later = dataclasses.replace(params, max_tokens=at + 3, stop=(stop,), min_tokens=at + 3)
    [sample] = llm.generate(TEXTS[0], later)[0].outputs
    assert (sample.token_ids, sample.finish_reason) == (found[: at + 3], "length")
    assert sample.text == "".join(pieces[: at + 3])
    ends = SamplingParams(temperature=0, max_tokens=9, logit_bias={0: 100.0}, min_tokens=3)
    [output] = llm.generate(TEXTS[0], ends)
    assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].token_ids.index(0) == 3
    assert output.outputs[0].finish_reason == "stop"


def test_finish_reasons_of_tokens(llm: LLM) -> None:
    end = SamplingParams(temperature=0, max_tokens=9, logit_bias={0: 100.0})
    [sample] = llm.generate(TEXTS[0], end)[0].outputs
    assert (sample.token_ids, sample.text, sample.finish_reason, sample.stop_reason) == ([0], "", "stop", None)
    shown = dataclasses.replace(end, include_stop_str_in_output=True, skip_special_tokens=False)
    assert llm.generate(TEXTS[0], shown)[0].outputs[0].text == END
    [sample] = llm.generate(TEXTS[0], dataclasses.replace(end, ignore_eos=True, skip_special_tokens=False))[0].outputs
    assert (sample.token_ids, sample.text, sample.finish_reason) == ([0] * 9, END * 9, "length")
    [sample] = llm.generate(TEXTS[0], with_changes(logit_bias={65: 100.0}, stop_token_ids=(65,)))[0].outputs
    assert (sample.token_ids, sample.text, sample.finish_reason, sample.stop_reason) == ([65], "", "stop", 65)


def test_text_never_splits_a_code_point(llm: LLM) -> None:
    """A model that may emit only the bytes of an emoji, in any order, whole or broken."""
    pieces = sorted(set(ids(llm, "🤗é")))
    assert llm.tokenizer is not None and len(pieces) == 6
    raw = {"prompt": "a", "max_tokens": 60, "temperature": 2.0, "ignore_eos": True, "seed": 3, "n": 2}
    raw["logit_bias"] = {str(token): bias for token, bias in only(pieces).items()}
    texts: list[list[str]] = [[], []]
    for output in llm.stream(raw):
        for sample in output.outputs:
            texts[sample.index].append(sample.text)
    for grown, sample in zip(texts, output.outputs, strict=True):
        assert set(sample.token_ids) <= set(pieces)
        assert sample.text == llm.tokenizer.decode(sample.token_ids)
        assert all(later.startswith(earlier) for earlier, later in pairwise(grown))
        assert "\ufffd" in sample.text
    whole = with_changes(max_tokens=4, logit_bias=only(ids(llm, "🤗")[:1]))
    assert llm.generate("a", whole)[0].outputs[0].text == "\ufffd" * 4, "nothing is lost where nothing is whole"


def test_logprobs_are_finite_and_add_up(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=10, logprobs=3, prompt_logprobs=2, seed=5, n=2, ignore_eos=True)
    [output] = llm.generate(TEXTS[2], params)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for sample in output.outputs:
        assert sample.logprobs is not None and len(sample.logprobs) == 10
        assert sample.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in sample.logprobs))
        for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
            assert math.isfinite(entry.logprob) and len(entry.top) == 3
            assert (entry.rank <= 3) == (token in [top for top, _ in entry.top])


# forks and aborts


def running(llm: LLM, steps: int = 6, **fields: Any) -> str:
    raw = {"prompt": TEXTS[0], "max_tokens": 20, "temperature": 0, "ignore_eos": True, **fields}
    request_id = llm.add_request(raw)
    for _ in range(steps):
        llm.step()
    return request_id


def finish(llm: LLM, *names: str) -> list[RequestOutput]:
    while llm.loop.has_work:
        llm.step()
    return [llm.pop(name) for name in names]


def test_a_fork_goes_on_from_the_text_and_the_logprobs_so_far(llm: LLM) -> None:
    parent = running(llm, logprobs=2, prompt_logprobs=1)
    same, hot = llm.fork(parent), llm.fork(parent, temperature=2.0, seed=9, stop=("never",))
    ours, theirs, other = finish(llm, parent, same, hot)
    [a], [b], [c] = ours.outputs, theirs.outputs, other.outputs
    assert (b.token_ids, b.text, b.finish_reason) == (a.token_ids, a.text, "length")
    assert theirs.prompt == ours.prompt == TEXTS[0]
    assert a.logprobs is not None and b.logprobs is not None
    assert [entry.logprob for entry in b.logprobs] == pytest.approx([entry.logprob for entry in a.logprobs], abs=1e-4)
    assert b.cumulative_logprob == pytest.approx(a.cumulative_logprob)
    assert ours.prompt_logprobs is not None and theirs.prompt_logprobs is None, "they are not repeated"
    assert c.token_ids[:6] == a.token_ids[:6] and c.token_ids != a.token_ids and len(c.token_ids) == 20
    assert llm.tokenizer is not None and c.text == llm.tokenizer.decode(c.token_ids)
    assert c.logprobs is not None and len(c.logprobs) == 20


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"prompt_logprobs": 3}, "prompt_logprobs"),
        ({"temprature": 1}, "temprature"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_fork_that_may_not_be_changes_nothing(llm: LLM, changes: dict[str, Any], field: str) -> None:
    parent = running(llm)
    with pytest.raises(InvalidRequest) as caught:
        llm.fork(parent, **changes)
    assert caught.value.field == field
    [output] = finish(llm, parent)
    assert tokens([output]) == tokens(llm.generate(TEXTS[0], with_changes(max_tokens=20)))


def test_what_does_not_run_cannot_be_forked(llm: LLM) -> None:
    parent = running(llm, n=2)
    for name, sample in (("other", 0), (parent, 2), (parent, -1)):
        with pytest.raises(NotFound, match="is not in flight"):
            llm.fork(name, sample)
    second = llm.fork(parent, 1)
    while llm.loop.has_work:
        llm.step()
    with pytest.raises(NotFound):
        llm.fork(parent)
    first, child = finish(llm, parent, second)
    assert child.outputs[0].token_ids == first.outputs[1].token_ids


def test_an_abort_gives_what_there_is_and_harms_nobody(llm: LLM) -> None:
    stays, goes = running(llm, 0), running(llm, 4, n=3, prompt=TEXTS[1])
    used = llm.loop.scheduler.pool.num_used
    output = llm.abort(goes)
    assert [(len(s.token_ids), s.finish_reason) for s in output.outputs] == [(4, "cancelled")] * 3
    assert all(s.text and s.pages for s in output.outputs)
    assert llm.loop.scheduler.pool.num_used == 1 < used
    waits = llm.add_request({"prompt": TEXTS[2]})
    assert llm.abort(waits).outputs[0].token_ids == []
    assert tokens(finish(llm, stays)) == tokens(llm.generate(TEXTS[0], with_changes(max_tokens=20)))


# building an engine


def test_settings_are_fields_or_one_config(model: str) -> None:
    config = EngineConfig(model=model, block_size=8, num_gpu_blocks_override=20, max_model_len=100, threads=1)
    ours = LLM(model, config=config)
    theirs = LLM(model, block_size=8, num_gpu_blocks_override=20, max_model_len=100, threads=1)
    assert ours.config == theirs.config and ours.plan == theirs.plan
    assert (ours.limits.max_model_len, ours.limits.max_pool_tokens, ours.limits.vocab_size) == (100, 160, VOCAB)
    assert tokens(ours.generate(TEXTS, GREEDY)) == tokens(theirs.generate(TEXTS, GREEDY))
    with pytest.raises(TypeError, match="give config or block_size, seed, not both"):
        LLM(model, config=config, block_size=8, seed=1)
    with pytest.raises(TypeError, match="blok_size"):
        LLM(model, blok_size=8)
    with pytest.raises(ConfigError, match="block_size: got 3, must be one of 1, 2, 4"):
        LLM(model, block_size=3)


def test_describe_says_what_fits(model: str) -> None:
    lines = LLM(model, block_size=8, num_gpu_blocks_override=20, threads=1).describe()
    assert lines == [
        "weights 3.2 MiB as float32",
        "pool 160.0 KiB: 20 pages of 8 tokens = 160 tokens; 1.0 requests of max_model_len 160 fit at once "
        "(max_num_seqs 256)",
        "max_model_len is 160 because the pool holds no more; give it more memory",
    ]


def test_progress_counts_the_bytes_of_the_weights(model: str) -> None:
    seen: list[tuple[int, int]] = []
    LLM(model, progress=lambda done, total: seen.append((done, total)), **SETTINGS)
    assert len(seen) == 3 + 4 * 9 and {total for _, total in seen} == {seen[-1][0]}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_folder_without_a_tokenizer_serves_token_ids(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    llm = LLM(str(folder), **SETTINGS)
    assert llm.tokenizer is None and llm.eos_token_ids[0] == 0
    wanted = tokens(LLM(model, **SETTINGS).generate([40, 41], GREEDY))
    [output] = llm.generate([40, 41], GREEDY)
    assert (tokens([output]), output.outputs[0].text) == (wanted, "")
    with pytest.raises(InvalidRequest, match=r"prompt: .*no tokenizer; send prompt_token_ids"):
        llm.generate("text", GREEDY)
    with pytest.raises(InvalidRequest, match=r"messages: .*no tokenizer"):
        llm.chat([{"role": "user", "content": "a"}], GREEDY)
    with pytest.raises(InvalidRequest, match=r"stop: got .*no tokenizer; send stop_token_ids"):
        llm.generate([40], with_changes(stop=("x",)))
    assert_empty(llm)


def test_the_door_costs_no_torch_until_an_engine_is_asked_for() -> None:
    code = (
        "import sys, quire\nfrom quire import EngineConfig, QuireError, SamplingParams\n"
        "SamplingParams(stop='x'), EngineConfig(model='m')\n"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'jinja2'} & set(sys.modules)))\n"
        "from quire import LLM\nprint('torch' in sys.modules, LLM.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\nTrue launch.llm\n"), done.stderr


def test_the_door_has_these_names_and_no_others() -> None:
    assert dir(quire) == sorted(quire.__all__)
    assert {name: getattr(quire, name).__name__ for name in quire.__all__ if name != "__version__"} == {
        name: name for name in quire.__all__ if name != "__version__"
    }
    with pytest.raises(AttributeError, match="module 'quire' has no attribute 'Llm'"):
        quire.Llm  # noqa: B018
