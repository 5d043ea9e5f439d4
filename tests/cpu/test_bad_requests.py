"""Rows of RELIABILITY part B that a request can carry, against the running engine, with the oracle of part B.

After every row: the stated code, the field and the limit in one line of text, no path, stack or address; the
neighbours of the same batch and the next request give the tokens that they give alone; no page is in use and the
books agree. What is extreme but allowed is served.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.requests import KNOWN, MAX_DEPTH, NOT_BUILT
from launch.llm import LLM, RequestOutput
from launch.models.tiny_llama import make_tiny_llama
from launch.prompts import read_lines, result_line, to_text
from pagetable.errors import AlreadyExists, FieldError, InvalidRequest, NotSupported, QuireError

ROOT = Path(__file__).resolve().parent.parent.parent
VOCAB, POOL = 502, 640  # tokens; the pool is smaller than the model's context, which is cut to it
NAN, INF, HUGE = math.nan, math.inf, 10**400
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
FIRST = GREEDY | {"prompt_token_ids": list(range(40, 75))}
LAST = GREEDY | {"prompt": "Why copy a page that two people read?"}
CANARY = GREEDY | {"prompt": "Once upon a time there was a small library", "max_tokens": 12}


def one(**fields: Any) -> dict[str, Any]:
    return {"prompt_token_ids": [5, 6, 7], "max_tokens": 4, **fields}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def said(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": 2}


REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
NULLABLE = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
TALK = {"role": "user", "content": "a"}
NO_IDS: tuple[Any, ...] = ("", "a\nb", "a\0", "x" * 129, 5, [], "\ud800")
NO_SALTS: tuple[Any, ...] = ("", "x" * (1 << 20), "/", "a\0", 5, [])
NO_TOKENS = ("1", 1.0, True, None, [1], NAN)
NO_BIASES = (NAN, INF, 100.1, "1", None, True, [1], HUGE)
NO_OBJECTS = ("{", "[1]", "null", "5", '"a"', "NaN", "{'a': 1}", '{"a": 1} {"b": 2}')
TOO_DEEP = ("[" * 200_000, '{"a":' * 100_000, '{"seed":' + "[" * 5000 + "}")
TWO_OF_ONE = ('"n": 1, "n": 1', '"prompt": "b"', '"stop": {"a": 1, "a": 2}')
DEEP_FIELDS = ("prompt_token_ids", "stop", "logit_bias", "seed", "n")
TWICE = "".join(f'"{i}": 0, ' for i in range(300_000))

# (row of part B, what is sent as an object or as a line of text, field that must be named, limit that must be named)
ROWS: list[tuple[int, dict[str, Any] | str, str, str]] = [
    *((1, one(temperature=x), "temperature", "from 0 to 100") for x in (NAN, INF, -INF, -1, -1e-9, 100.1)),
    *((1, f'{{"prompt": "a", "temperature": {x}}}', "temperature", "from 0 to 100") for x in ("1e400", "-1e400")),
    *((3, one(top_p=x), "top_p", "above 0 and at most 1") for x in (0, -0.0, 1.01, NAN, -1)),
    *((3, one(min_p=x), "min_p", "from 0 to 1") for x in (-0.1, 1.1, NAN)),
    *((5, one(repetition_penalty=x), "repetition_penalty", "from 0.01 to 10") for x in (NAN, 1e9, 0, -1)),
    *((5, one(presence_penalty=x), "presence_penalty", "from -2 to 2") for x in (NAN, 1e9, -2.01)),
    *((5, one(frequency_penalty=x), "frequency_penalty", "from -2 to 2") for x in (NAN, 1e9, -2.01)),
    *((6, one(max_tokens=x), "max_tokens", "from 1 to 2147483647") for x in (0, -1, 2**31, 2**63)),
    (6, {"prompt_token_ids": [1] * POOL}, "prompt_token_ids", "at most 639 tokens (max_model_len 640"),
    (6, one(max_tokens=2**31 - 1), "max_tokens", "at most 637 (max_model_len 640 - 3 prompt tokens)"),
    (7, one(min_tokens=5), "min_tokens", "from 0 to 4"),
    (7, {"prompt_token_ids": [5], "min_tokens": 2**31 - 1}, "min_tokens", "from 0 to 639"),
    (7, {"prompt_token_ids": [5], "min_tokens": 2**63}, "min_tokens", "from 0 to 2147483647"),
    *((9, one(n=x), "n", "from 1 to 16") for x in (10**9, 17, 0, -1)),
    (9, one(best_of=10**9), "best_of", "no such field"),
    *((10, one(seed=x), "seed", "from 0 to 9223372036854775807") for x in (2**63, 2**64, -1, -(2**63) - 1)),
    *((11, one(logprobs=x), "logprobs", "from 0 to 20") for x in (-1, 21, VOCAB)),
    *((11, one(prompt_logprobs=x), "prompt_logprobs", "from 0 to 20") for x in (-1, 21, VOCAB)),
    (14, {"max_tokens": 1}, "prompt", "exactly one of prompt, messages, prompt_token_ids"),
    (14, {}, "prompt", "exactly one of"),
    (14, {"prompt": "a", "prompt_token_ids": [1]}, "prompt", "exactly one of"),
    (14, {"prompt": "a", **said(TALK)}, "prompt", "exactly one of"),
    *((14, {"prompt": x}, "prompt", "be a string") for x in (None, 1, [1], ["a"], {"text": "a"}, True)),
    *((14, {"prompt_token_ids": x}, "prompt_token_ids", "a list of token ids") for x in (None, 1, "12", {"0": 1})),
    (15, one(deadline=0), "deadline", "no such field"),
    (15, one(priority=2**40), "priority", "no such field"),
    *((16, one(request_id=x), "request_id", "1 to 128 printable") for x in NO_IDS),
    (18, {"prompt": ""}, "prompt", "at least 1 character"),
    (18, {"prompt_token_ids": []}, "prompt_token_ids", "at least 1 token"),
    (18, said(), "messages", "1 to 4096 messages"),
    *((19, {"prompt_token_ids": [1, x]}, "prompt_token_ids", "from 0 to 501") for x in (-1, VOCAB, 2**63 - 1, HUGE)),
    *((19, {"prompt_token_ids": [1, x]}, "prompt_token_ids", "look at index 1") for x in NO_TOKENS),
    *((19, one(stop_token_ids=[x]), "stop_token_ids", "from 0 to 501") for x in (-1, VOCAB, 2**63 - 1, "1", 1.0, [1])),
    *((19, one(logit_bias={x: 1}), "logit_bias", "from 0 to 501") for x in ("502", "9999999999")),
    *((19, one(logit_bias={x: 1}), "logit_bias", "token ids") for x in ("-1", "1.0", "", "a", "9" * 20)),
    (20, {"prompt_token_ids": [1] * 100_000}, "prompt_token_ids", "max_model_len 640"),
    (20, {"prompt": "a" * (27 << 20)}, "prompt", "max_prompt_bytes"),
    (20, said({"role": "user", "content": "a" * (1 << 20)}), "messages", "max_prompt_bytes"),
    (20, said(*[TALK] * 4097), "messages", "1 to 4096 messages"),
    (21, {"prompt_token_ids": [1] * 700}, "prompt_token_ids", "at most 639 tokens"),
    (22, {"prompt_token_ids": [1] * 320, "max_tokens": 321}, "max_tokens", "at most 320"),
    (25, {"prompt": "a\ud800b"}, "prompt", "lone surrogate at character 1"),
    (25, said({"role": "user", "content": "\udfff"}), "messages", "lone surrogate"),
    (25, one(stop=["\ud800"]), "stop", "lone surrogate"),
    *((28, one(**{x: 1}), x, "no such field") for x in ("block_ids", "kv_transfer_params", "page_hashes", "tp_size")),
    *((30, one(cache_salt=x), "cache_salt", "1 to 128 characters") for x in NO_SALTS),
    *((33, one(model=x), "model", "no such field") for x in ("other", "../../etc", "x" * 5000)),
    (33, one(lora_name="../../etc"), "lora_name", "no such field"),
    # type confusion
    *((0, one(**{f: x}), f, "a number ") for f in REALS for x in ("1", True, None, [1], [[1]], {"a": 1}, HUGE, -HUGE)),
    *((0, one(**{f: x}), f, "whole number from ") for f in INTS for x in ("1", True, 1.0, [1], {"a": 1}, HUGE, -HUGE)),
    *((0, one(**{f: None}), f, "whole number from ") for f in INTS if f not in NULLABLE),
    *((0, one(**{f: x}), f, "true or false") for f in FLAGS for x in (0, 1, "true", None, [True])),
    *((0, one(stop=x), "stop", "a list of strings") for x in (None, 1, {"a": 1}, [1], [None], [["a"]])),
    *((0, one(stop=x), "stop", "1 to 256 bytes") for x in ("", [""], ["é" * 129])),
    (0, one(stop=["x"] * 17), "stop", "at most 16 strings"),
    (0, one(stop=["x"] * 500_000), "stop", "at most 16 strings"),
    (0, one(stop_token_ids=[1] * 500_000), "stop_token_ids", "at most 64 ids"),
    *((0, one(stop_token_ids=x), "stop_token_ids", "a list of token ids") for x in (5, "5", {"5": 1})),
    (0, one(logit_bias={str(i): 1 for i in range(100_000)}), "logit_bias", "at most 1024 entries"),
    *((0, one(logit_bias={"5": x}), "logit_bias", "from -100 to 100") for x in NO_BIASES),
    *((0, one(logit_bias=x), "logit_bias", "map token ids") for x in ([5], "5", 5, True, {"5": 1, "05": 2})),
    *((0, said(x), "messages[0]", "role and content") for x in ("hi", 5, None, [TALK])),
    *((0, said({"role": x, "content": "a"}), "messages[0].role", "non-empty string") for x in (1, "", None, ["user"])),
    *((0, said({"role": "user", "content": x}), "messages[0].content", "a string") for x in (1, None, {"a": 1})),
    (0, said({"role": "user", "content": [[]]}), "messages[0].content[0]", "a part like"),
    *((0, {"messages": x}, "messages", "be a list of 1 to 4096") for x in ("hi", TALK, 5, None)),
    *((0, one(**{f: nested(MAX_DEPTH + 1)}), f, "nested at most 8 deep") for f in DEEP_FIELDS),
    *((0, f'{{"prompt": "a", "seed": {"[" * d}{"]" * d}}}', "seed", "nested at most 8") for d in (100, 900)),
    (0, one(extra=nested(900)), "extra", "no such field"),
    (0, one(**{"": 1}), "''", "no such field"),
    (0, one(**{"a\nb": 1}), "'a\\nb'", "no such field"),
    (0, one(temprature=1), "temprature", "did you mean temperature?"),
    # lines that are no object
    *((0, x, "line 1", "a JSON object") for x in NO_OBJECTS),
    *((0, x, "line 1", "a JSON object (RecursionError)") for x in TOO_DEEP),
    (0, '{"seed": ' + "9" * 5000 + "}", "line 1", "a JSON object (ValueError)"),
    *((0, f'{{"prompt": "a", {x}}}', "line 1", "each key once") for x in TWO_OF_ONE),
    (0, f'{{"prompt": "a", "logit_bias": {{{TWICE}"299999": 1}}}}', "line 1", "each key once"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    return folder


class Engine:
    """One engine for all rows: whatever a row leaves behind, a later one would meet."""

    def __init__(self, model: Path, **fields: Any) -> None:
        self.folder = model
        self.llm = LLM(str(model), threads=1, **fields)
        self.alone = self.tokens([self.run(raw)[0] for raw in (FIRST, LAST, CANARY)])

    def run(self, *raws: Any) -> list[RequestOutput | QuireError]:
        return self.llm.generate_raw(raws)

    @staticmethod
    def tokens(results: Sequence[RequestOutput | QuireError]) -> list[list[int]]:
        for result in results:
            assert isinstance(result, RequestOutput), str(result)
        return [list(result.outputs[0].token_ids) for result in results if isinstance(result, RequestOutput)]

    def check(self) -> None:
        """The engine is empty, its books agree, and a greedy request gives what it gave at first."""
        scheduler = self.llm.loop.scheduler
        assert not self.llm.loop.has_work and self.llm._collectors == {}
        assert (scheduler.pool.num_used, scheduler.pool.num_retiring) == (0, 0)
        assert scheduler.pool.num_available == scheduler.pool.num_pages
        scheduler.check()
        assert self.tokens(self.run(CANARY)) == self.alone[2:]

    def refuse(self, bad: Any, count: int = 1) -> QuireError:
        """The answer to `bad`, whose neighbours must not notice it."""
        first, *errors, last = self.run(FIRST, *[bad] * count, LAST)
        assert self.tokens([first, last]) == self.alone[:2]
        assert len({str(error) for error in errors}) == 1 and len(errors) == count
        self.check()
        [error, *_] = errors
        assert isinstance(error, QuireError), "it was to be refused"
        text = str(error)
        assert len(text) < 400 and text.isprintable(), text
        for hidden in ("Traceback", " 0x", ".py", str(self.folder), str(ROOT), "object at"):
            assert hidden not in text
        return error


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, num_gpu_blocks_override=POOL // 16, max_num_seqs=32)


def line_of(sent: dict[str, Any] | str) -> str:
    """As it stands in a file: what JSON has no word for (NaN, half a surrogate pair) included."""
    return sent if isinstance(sent, str) else json.dumps(sent)


def raw_of(sent: dict[str, Any] | str) -> Any:
    [raw] = read_lines([line_of(sent).encode()], {})
    return raw


IDS = [f"row{row}-{field}-{index}" for index, (row, _, field, _) in enumerate(ROWS)]


@pytest.mark.parametrize(("row", "sent", "field", "limit"), ROWS, ids=IDS)
def test_a_bad_request_is_refused_and_nobody_else_notices(
    engine: Engine, row: int, sent: dict[str, Any] | str, field: str, limit: str
) -> None:
    error = engine.refuse(raw_of(sent))
    assert isinstance(error, InvalidRequest) and error.code == "INVALID_ARGUMENT"
    assert error.field == field
    assert str(error).startswith(f"{field}: got ")
    assert limit in str(error)


UNBUILT = [
    *((27, one(**{name: "gASV"}), name) for name in ("prompt_embeds", "multi_modal_data", "images")),
    *((33, one(**{name: "../../etc"}), name) for name in ("adapter", "lora")),
    (0, said({"role": "user", "content": "a", "tool_calls": []}), "messages[0].tool_calls"),
    (0, said({"role": "user", "content": [{"type": "image_url"}]}), "messages[0].content[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "sent", "field"), UNBUILT, ids=[f"row{row}-{field}" for row, _, field in UNBUILT])
def test_what_is_not_built_is_said_so(engine: Engine, row: int, sent: dict[str, Any], field: str) -> None:
    error = engine.refuse(raw_of(sent))
    assert isinstance(error, NotSupported) and error.code == "UNIMPLEMENTED"
    assert str(error).startswith(f"{field}: ")


@pytest.mark.parametrize("raw", [None, 5, "prompt", [one()], [], b"{}", {1: 2}, {None: 1}, {("a",): 1}], ids=repr)
def test_what_is_no_json_object_is_refused_too(engine: Engine, raw: Any) -> None:
    error = engine.refuse(raw)
    assert isinstance(error, InvalidRequest) and error.field == "request"


DEPTHS = range(960, 1000)


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_depth_of_nesting_is_more_than_one_bad_line(engine: Engine, depth: int) -> None:
    """Near the interpreter's limit a line can be read and yet be too deep to be shown."""
    for field in ("stop", "logit_bias", "unknown"):
        line = f'{{"prompt": "a", "{field}": {"[" * depth}{"]" * depth}}}'
        [error] = engine.llm.generate_raw(read_lines([line.encode()], {}))
        assert isinstance(error, InvalidRequest) and error.field in (field, "line 1")


def test_row_33_twenty_thousand_names_leave_nothing(engine: Engine) -> None:
    def raws() -> Iterator[dict[str, Any]]:
        for i in range(20_000):
            yield FIRST if i % 5000 == 0 else one(model=f"name-{i}")

    results = engine.llm.generate_raw(raws())
    assert engine.tokens(results[::5000]) == [engine.alone[0]] * 4
    assert sum(isinstance(result, InvalidRequest) and result.field == "model" for result in results) == 20_000 - 4
    engine.check()


@pytest.mark.parametrize("field", ["seed", "n", "max_tokens", "temperature", "prompt_token_ids", "extra"])
def test_a_number_too_long_to_be_shown_is_refused(engine: Engine, field: str) -> None:
    error = engine.refuse(one(**{field: [10**5000] if field == "prompt_token_ids" else 10**5000}))
    assert isinstance(error, InvalidRequest) and error.field == field


# row 16


def test_row_16_an_id_in_flight_is_refused_and_the_first_goes_on(engine: Engine) -> None:
    llm = engine.llm
    mine = llm.add_request(FIRST | {"request_id": "mine"})
    llm.step()
    for _ in range(3):
        with pytest.raises(AlreadyExists, match="request_id 'mine' is in flight") as caught:
            llm.add_request(LAST | {"request_id": "mine"})
        assert caught.value.code == "ALREADY_EXISTS"
    while llm.loop.has_work:
        llm.step()
    with pytest.raises(AlreadyExists):  # its output still waits to be taken
        llm.add_request(LAST | {"request_id": "mine"})
    assert llm.pop(mine).outputs[0].token_ids == engine.alone[0]
    again = engine.run(LAST | {"request_id": "mine"})
    assert engine.tokens(again) == [engine.alone[1]]
    engine.check()


def test_row_16_in_one_batch_the_second_of_two_is_refused(engine: Engine) -> None:
    error = engine.refuse(raw_of(one(request_id="x", top_p=2)), count=3)
    assert isinstance(error, InvalidRequest) and error.field == "top_p"  # a refused id is not taken
    first, second, third = engine.run(FIRST | {"request_id": "x"}, LAST | {"request_id": "x"}, LAST)
    assert isinstance(second, AlreadyExists) and "request_id 'x'" in str(second)
    assert engine.tokens([first, third]) == engine.alone[:2]
    engine.check()


def test_row_16_a_chosen_id_never_takes_that_of_another_request(engine: Engine) -> None:
    """Ids that the engine gives are fresh, whatever others call themselves, and are not those of people who count."""
    mine = engine.run(LAST)[0]
    assert isinstance(mine, RequestOutput)
    number = int(mine.request_id.removeprefix("auto-"))
    taken = [FIRST | {"request_id": f"auto-{number + ahead}"} for ahead in range(1, 8)]
    results = engine.run(*taken, LAST, LAST, *(FIRST | {"request_id": str(i)} for i in range(20)))
    assert engine.tokens(results) == [engine.alone[0]] * 7 + [engine.alone[1]] * 2 + [engine.alone[0]] * 20
    engine.check()


# extreme, but allowed

LONG = [7 + i % 400 for i in range(POOL - 1)]
BAN = {str(token): -100 for token in range(VOCAB) if token != 7}
AS_GREEDY: list[dict[str, Any]] = [
    {"temperature": 1e-9},
    {"temperature": 5e-324},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 100, "top_k": 1, "top_p": 5e-324, "min_p": 1},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 1.0},
    {"top_k": 2**31 - 1, "top_p": 1e-9, "seed": 2**63 - 1},
    {"logit_bias": {str(token): 100 for token in range(VOCAB)}},
    {"logprobs": 20, "prompt_logprobs": 20, "stop_token_ids": [], "stop": [], "logit_bias": {}},
]  # fmt: skip


@pytest.mark.parametrize("changes", AS_GREEDY, ids=[str(i) for i in range(len(AS_GREEDY))])
def test_extreme_ways_to_be_greedy(engine: Engine, changes: dict[str, Any]) -> None:
    [result] = engine.run(raw_of(FIRST | changes))
    assert engine.tokens([result]) == engine.alone[:1]
    engine.check()


EXTREMES: list[tuple[str, dict[str, Any], int | None]] = [
    ("hot", {"temperature": 100, "max_tokens": 60, "ignore_eos": True}, 60),
    ("hot and flat", {"temperature": 100, "top_k": 2**31 - 1, "min_p": 5e-324, "top_p": 1 - 2**-53}, None),
    *(
        (f"penalties {p}", {"presence_penalty": p, "frequency_penalty": p, "max_tokens": 120, "ignore_eos": True}, 120)
        for p in (-2, 2)
    ),
    *((f"repetition {p}", {"repetition_penalty": p, "max_tokens": 120, "ignore_eos": True}, 120) for p in (0.01, 10)),
    ("greedy repetition", {"repetition_penalty": 0.01, "temperature": 0, "max_tokens": 60, "ignore_eos": True}, 60),
    ("min is max", {"min_tokens": 40, "max_tokens": 40, "logit_bias": {"0": 100, "2": 100}}, 40),
    ("many stops", {"stop_token_ids": list(range(64)), "stop": ["é" * 128] * 16, "min_tokens": 4, "max_tokens": 4}, 4),
    ("long names", {"request_id": "é " * 64, "cache_salt": "A:" * 64, "max_tokens": 3, "ignore_eos": True}, 3),
    ("seed 0", {"seed": 0, "max_tokens": 3, "ignore_eos": True}, 3),
    ("as many as fit", {"prompt_token_ids": LONG[:600], "ignore_eos": True}, 40),
    ("room for one", {"prompt_token_ids": LONG}, 1),
    ("top of the range", {"prompt_token_ids": [VOCAB - 1] * 9, "logprobs": 20, "prompt_logprobs": 20}, None),
    ("only one allowed", {"logit_bias": BAN, "temperature": 1.5, "max_tokens": 9, "ignore_eos": True}, 9),
]


@pytest.mark.parametrize(("changes", "count"), [e[1:] for e in EXTREMES], ids=[e[0] for e in EXTREMES])
def test_extreme_values_that_are_allowed_are_served(engine: Engine, changes: dict[str, Any], count: int | None) -> None:
    sent = {"prompt_token_ids": [5, 6, 7], "max_tokens": None, **changes}
    first, result, last = engine.run(FIRST, raw_of(sent), LAST)
    assert engine.tokens([first, last]) == engine.alone[:2]
    assert isinstance(result, RequestOutput), str(result)
    line = json.loads(to_text(result_line(0, result)))
    assert len(line["outputs"]) == 1
    output = line["outputs"][0]
    assert output["finish_reason"] == "length" if count else output["finish_reason"] in ("length", "stop")
    assert all(0 <= token < VOCAB for token in output["token_ids"])
    assert len(output["token_ids"]) == count if count else 1 <= len(output["token_ids"]) <= POOL
    if "logprobs" in sent:
        assert all(len(entry["top"]) == 20 and entry["logprob"] <= 0 for entry in output["logprobs"])
        assert len(line["prompt_logprobs"]) == len(sent["prompt_token_ids"])
        assert all(len(entry["top"]) == 20 and entry["logprob"] <= 0 for entry in line["prompt_logprobs"][1:])
    if changes.get("logit_bias") is BAN:
        assert output["token_ids"] == [7] * 9
    engine.check()


def test_row_9_sixteen_samples_that_do_not_fit_together_run_after_one_another(engine: Engine) -> None:
    sent = {"prompt_token_ids": list(range(100, 120)), "n": 16, "max_tokens": 100, "ignore_eos": True, "logprobs": 20}
    first, result, last = engine.run(FIRST, sent, LAST)
    assert engine.tokens([first, last]) == engine.alone[:2]
    assert isinstance(result, RequestOutput)
    assert [(len(each.token_ids), each.finish_reason) for each in result.outputs] == [(100, "length")] * 16
    assert len({tuple(each.token_ids) for each in result.outputs}) == 16
    assert all(math.isfinite(entry.logprob) for each in result.outputs for entry in each.logprobs or ())
    engine.check()


def test_row_11_prompt_logprobs_of_a_cached_prefix_are_all_there(engine: Engine) -> None:
    sent = {"prompt_token_ids": list(range(200, 264)), "max_tokens": 1, "prompt_logprobs": 20}
    found = [
        result.prompt_logprobs for result in engine.run(sent) + engine.run(sent) if isinstance(result, RequestOutput)
    ]
    assert len(found) == 2 and found[0] == found[1]
    assert found[0] is not None and len(found[0]) == 64 and found[0][0] is None
    engine.check()


def test_row_22_two_that_need_the_whole_pool_each_are_both_served(engine: Engine) -> None:
    sent = {"prompt_token_ids": LONG[:320], "max_tokens": 320, "temperature": 0, "ignore_eos": True}
    one_of_them, other = engine.run(sent, sent)
    assert engine.tokens([one_of_them]) == engine.tokens([other])
    assert len(engine.tokens([other])[0]) == 320
    engine.check()


@pytest.mark.parametrize(
    "text", ["\0", "\uffff", "\u202ekoob a", "a\u200db", "👩\u200d🚀", "\ufeff", "e\u0301" * 30, "<|im_end|>" * 9]
)
def test_row_25_odd_text_is_served(engine: Engine, text: str) -> None:
    for sent in ({"prompt": text}, said({"role": text, "content": text})):
        [result] = engine.run(raw_of(GREEDY | sent))
        assert isinstance(result, RequestOutput), str(result)
        assert result.outputs[0].text.encode() and len(result.outputs[0].token_ids) <= 6
    engine.check()


# through the command line


def test_a_file_of_all_rows_answers_each_in_its_place_and_the_good_lines_do_not_notice(
    model: Path, tmp_path: Path
) -> None:
    """Good lines of all kinds, also sampled ones without a seed, between each two bad ones."""
    good = [FIRST, LAST, one(max_tokens=5, n=2), said({"role": "user", "content": "What is a page?"}), one(logprobs=2)]
    bad = [(line_of(sent), field, "INVALID_ARGUMENT") for _, sent, field, _ in ROWS]
    bad += [(line_of(sent), field, "UNIMPLEMENTED") for _, sent, field in UNBUILT]
    bad += [(f'{{"prompt": "a", "stop": {"[" * d}{"]" * d}}}', "stop or line", "INVALID_ARGUMENT") for d in DEPTHS]
    mixed = [line for index, (text, _, _) in enumerate(bad) for line in (text, json.dumps(good[index % len(good)]))]
    flags = ("--num-gpu-blocks-override", str(POOL // 16), "--max-num-seqs", "32", "--threads", "1", "--json")
    found = []
    for name, lines in (("mixed", mixed), ("good", mixed[1::2])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogatepass")
        command = [sys.executable, "-m", "launch.cli", "generate", str(model), "--prompts", str(path), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert (done.returncode, "Traceback" in done.stderr) == (int(name == "mixed"), False), done.stderr[-2000:]
        found.append([json.loads(line) for line in done.stdout.splitlines()])
    answers, alone = found
    assert [line["index"] for line in answers] == list(range(len(mixed)))
    assert [line["outputs"] for line in answers[1::2]] == [line["outputs"] for line in alone]
    for number, ((_, field, code), line) in enumerate(zip(bad, answers[::2], strict=True)):
        error, named = line["error"], f"line {2 * number + 1}" if field == "line 1" else field
        if field == "stop or line":
            named = error["field"]
            assert named in ("stop", f"line {2 * number + 1}")
        assert (error["code"], error["field"]) == (code, named if code == "INVALID_ARGUMENT" else None)
        assert error["message"].startswith(f"{named}: ")
        assert str(tmp_path) not in error["message"] and str(model) not in error["message"]


# whatever an object says

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.sampled_from((2**31, 2**63, -(2**63), HUGE, NAN, INF, -INF, 1e-300))
    | st.floats(-3, 3)
    | st.text(st.characters(), max_size=5)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("0123a", max_size=3), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from((*KNOWN, *NOT_BUILT, "", "model")) | st.text(max_size=3)
# values that are allowed, mostly: what passes the validator must also run
_FAIR = st.fixed_dictionaries(
    {"prompt_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)},
    optional={
        "n": st.integers(1, 4),
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(-1, 600),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.01, 10),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1).map(str), st.floats(-100, 100), max_size=5),
        "stop": st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=3), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=5),
        "min_tokens": st.integers(0, 8),
        "max_tokens": st.integers(1, 12),
        "logprobs": st.none() | st.integers(0, 20),
        "prompt_logprobs": st.none() | st.integers(0, 20),
        "ignore_eos": st.booleans(),
        "cache_salt": st.sampled_from(("a", "b", "/")),
        "request_id": st.sampled_from(("a", "b", "c")),
        "seed": st.integers(0, 2**63 - 1),
    },
)
_OBJECTS = st.dictionaries(_NAMES, _VALUES, max_size=6)
_SPOILT = st.tuples(_FAIR, st.dictionaries(_NAMES, _VALUES, max_size=1)).map(lambda both: both[0] | both[1])


@pytest.fixture(scope="module")
def narrow(model: Path) -> Engine:
    """A context so short that even a request without max_tokens ends soon, and a pool that two requests fill."""
    fields = {"max_model_len": 80, "block_size": 4, "num_gpu_blocks_override": 30, "max_num_seqs": 8}
    return Engine(model, **fields, max_num_batched_tokens=24)


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(_FAIR | _SPOILT | _OBJECTS | _VALUES, min_size=1, max_size=4))
def test_any_batch_is_answered_and_leaves_an_empty_engine(narrow: Engine, raws: list[Any]) -> None:
    results = narrow.run(*raws)
    assert len(results) == len(raws)
    for raw, result in zip(raws, results, strict=True):
        if isinstance(result, QuireError):
            assert not isinstance(result, FieldError) or result.field
            assert len(str(result)) < 400 and str(result).isprintable()
            continue
        line = json.loads(to_text(result_line(0, result)))
        assert len(line["outputs"]) == raw.get("n", 1)
        for output in line["outputs"]:
            assert output["finish_reason"] in ("length", "stop"), output["stop_reason"]
            assert 1 <= len(output["token_ids"]) <= (raw.get("max_tokens") or 80)
            assert all(0 <= token < VOCAB for token in output["token_ids"])
    narrow.check()
