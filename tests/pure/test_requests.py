"""Rows of RELIABILITY part B that a raw request can carry, and what a good one becomes."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cluster.chat_template import ChatTemplate
from cluster.requests import KNOWN, Text, parse_jsonl, parse_request
from cluster.tokenizer import Tokenizer, byte_alphabet
from pagetable.errors import InvalidRequest, NotSupported
from pagetable.sampling import Limits, Request, SamplingParams


def make_text(template: str | None = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}") -> Text:
    """One token a byte, in the byte's order, and one for the end."""
    library = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    chat = ChatTemplate(template, {}, lambda: datetime(2026, 1, 1)) if template is not None else None
    return Text(Tokenizer(library, {"eos_token": "</s>"}), chat)


TEXT = make_text()
VOCAB = 257
LIMITS = Limits(vocab_size=VOCAB, max_model_len=200, max_pool_tokens=160)


def parse(raw: dict[str, Any], text: Text | None = TEXT, limits: Limits = LIMITS) -> Request:
    return parse_request(raw, limits, text=text, request_id="auto-1", seed=11, eos_token_ids=(256,))


def test_what_a_good_request_becomes() -> None:
    assert parse({"prompt": "hé"}) == Request(
        "auto-1", tuple("hé".encode()), SamplingParams(max_tokens=157, seed=11), (256,), ""
    )
    raw = {
        "prompt_token_ids": [1, 2],
        "request_id": "mine",
        "cache_salt": "s",
        "seed": 3,
        "stop": "x",
        "logit_bias": {"5": 1, "256": -2.5},
        "max_tokens": 4,
        "logprobs": None,
        "temperature": 0,
    }
    params = SamplingParams(seed=3, stop=("x",), logit_bias={5: 1, 256: -2.5}, max_tokens=4, temperature=0)
    assert parse(raw) == Request("mine", (1, 2), params, (256,), "s")
    assert parse({"messages": [{"role": "user", "content": "hi"}]}).prompt == tuple(b"user:hi;")


def test_every_sampling_field_passes_by_its_name() -> None:
    assert set(SamplingParams.__dataclass_fields__) < set(KNOWN)
    values = {"n": 2, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "ignore_eos": True, "min_tokens": 1, "logprobs": 2}
    got = parse({"prompt": "a", "max_tokens": 3, **values}).params
    assert got == SamplingParams(max_tokens=3, seed=11, **values)  # type: ignore[arg-type]


def one(**fields: Any) -> dict[str, Any]:
    return {"prompt_token_ids": [1, 2, 3], "max_tokens": 8, **fields}


NAN, INF = float("nan"), float("inf")
LONG = list(range(250)) * 2
# (row of part B, what is sent, field that must be named, limit that must be named)
ROWS: list[tuple[int, dict[str, Any], str, str]] = [
    *((1, one(temperature=x), "temperature", "from 0 to 100") for x in (NAN, INF, -INF, -1, "1", True, None)),
    *((3, one(top_p=x), "top_p", "above 0 and at most 1") for x in (0, 1.01, NAN)),
    *((3, one(min_p=x), "min_p", "from 0 to 1") for x in (-0.1, 1.1, NAN)),
    *((5, one(repetition_penalty=x), "repetition_penalty", "from 0.01 to 10") for x in (NAN, 1e9, 0, -1)),
    *((5, one(presence_penalty=x), "presence_penalty", "from -2 to 2") for x in (NAN, 1e9, -1e9)),
    *((5, one(frequency_penalty=x), "frequency_penalty", "from -2 to 2") for x in (NAN, 1e9, -1e9)),
    *((6, one(max_tokens=x), "max_tokens", "from 1 to 2147483647") for x in (0, -1, 2**31, 2**63, 1.0, "8")),
    (6, {"prompt_token_ids": [1] * 200}, "prompt_token_ids", "at most 199 tokens"),
    (7, one(min_tokens=9), "min_tokens", "from 0 to 8"),
    (7, {"prompt_token_ids": [1, 2], "min_tokens": 2**31 - 1}, "min_tokens", "from 0 to 158"),
    (7, {"prompt_token_ids": [1, 2], "min_tokens": 2**63}, "min_tokens", "from 0 to 2147483647"),
    *((9, one(n=x), "n", "from 1 to 16") for x in (10**9, 17, 0, -1, True)),
    (9, one(best_of=10**9), "best_of", "no such field"),
    *((10, one(seed=x), "seed", "from 0 to 9223372036854775807") for x in (2**63, 2**64, -(2**63) - 1, 1.5)),
    *((11, one(logprobs=x), "logprobs", "from 0 to 20") for x in (-1, 21, VOCAB, True)),
    *((11, one(prompt_logprobs=x), "prompt_logprobs", "from 0 to 20") for x in (-1, 21, VOCAB)),
    (14, {"max_tokens": 1}, "prompt", "exactly one of prompt, messages, prompt_token_ids"),
    (14, {"prompt": "a", "prompt_token_ids": [1]}, "prompt", "exactly one of"),
    (14, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", "exactly one of"),
    (14, {"prompt": [1, 2]}, "prompt", "be a string"),
    (14, {"prompt": None}, "prompt", "be a string"),
    (14, {"prompt_token_ids": "12"}, "prompt_token_ids", "be a list of token ids"),
    (15, one(priority=2**40), "priority", "no such field"),
    (16, one(request_id="a\nb"), "request_id", "1 to 128 printable"),
    (18, {"prompt": ""}, "prompt", "at least 1 character"),
    (18, {"prompt_token_ids": []}, "prompt_token_ids", "at least 1 token"),
    (18, {"messages": []}, "messages", "1 to 4096 messages"),
    *((19, {"prompt_token_ids": [1, x]}, "prompt_token_ids", "from 0 to 256") for x in (-1, VOCAB, 2**63 - 1, "1")),
    *((19, one(stop_token_ids=[x]), "stop_token_ids", "from 0 to 256") for x in (-1, VOCAB, 2**63 - 1)),
    *((19, one(logit_bias={x: 1}), "logit_bias", "from 0 to 256") for x in ("257", "9999999999")),
    *((19, one(logit_bias={x: 1}), "logit_bias", "token ids") for x in ("-1", "1.0", "", "٣", "9" * 20)),
    (20, {"prompt_token_ids": LONG}, "prompt_token_ids", "max_model_len 200"),
    (20, {"prompt": "a" * 1593}, "prompt", "at most 796 bytes"),
    (20, {"messages": [{"role": "user", "content": "a" * 800}]}, "messages", "at most 796 bytes"),
    (21, {"prompt_token_ids": [1] * 160, "max_tokens": 1}, "prompt_token_ids", "exceeds_pool"),
    (22, {"prompt_token_ids": [1] * 150, "max_tokens": 11}, "max_tokens", "exceeds_pool"),
    (25, {"prompt": "a\ud800b"}, "prompt", "lone surrogate at character 1"),
    (25, {"messages": [{"role": "user", "content": "\udfff"}]}, "messages", "lone surrogate"),
    (25, one(stop=["\ud800"]), "stop", "lone surrogate"),
    *((28, one(**{x: 1}), x, "no such field") for x in ("block_ids", "kv_transfer_params", "page_hashes", "tp_size")),
    *((30, one(cache_salt=x), "cache_salt", "1 to 128 characters") for x in ("", "x" * (1 << 20), "/", "a\x00", 5)),
    (0, one(stop=[""]), "stop", "1 to 256 bytes"),
    (0, one(stop=["x" * 257]), "stop", "1 to 256 bytes"),
    (0, one(stop=["x"] * 17), "stop", "at most 16 strings"),
    (0, one(stop={"a": 1}), "stop", "a list of strings"),
    (0, one(stop=None), "stop", "a list of strings"),
    (0, one(stop_token_ids=[1] * 65), "stop_token_ids", "at most 64 ids"),
    (0, one(stop_token_ids=5), "stop_token_ids", "a list of token ids"),
    (0, one(logit_bias={"5": NAN}), "logit_bias", "from -100 to 100"),
    (0, one(logit_bias={"5": 1, "05": 2}), "logit_bias", "each once"),
    (0, one(logit_bias=[5]), "logit_bias", "map token ids"),
    (0, one(ignore_eos="yes"), "ignore_eos", "true or false"),
    (0, one(top_k=2**31), "top_k", "from -1 to 2147483647"),
    (0, one(temprature=1), "temprature", "did you mean temperature?"),
]


@pytest.mark.parametrize(
    ("row", "raw", "field", "limit"), ROWS, ids=[f"row{row}-{i}" for i, (row, *_) in enumerate(ROWS)]
)
def test_part_b(row: int, raw: dict[str, Any], field: str, limit: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(raw)
    text = str(caught.value)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.field == field
    assert text.startswith(f"{field}: ")
    assert limit in text
    assert len(text) < 300
    assert "Traceback" not in text and " 0x" not in text and "/work" not in text and ".py" not in text


@pytest.mark.parametrize(
    "field", ["prompt_embeds", "multi_modal_data", "tools", "response_format", "logits_processors"]
)
def test_known_but_not_built_is_said_so(field: str) -> None:
    with pytest.raises(NotSupported, match=f"{field}: is not built"):
        parse(one(**{field: "AAAA"}))


@pytest.mark.parametrize("text", ["\x00", "\uffff", "\u202eRTL", "a\u200db", "🤗"])
def test_odd_but_valid_text_is_taken(text: str) -> None:
    assert parse({"prompt": text}).prompt == tuple(text.encode())


def test_text_needs_a_tokenizer_and_messages_a_template() -> None:
    for raw in ({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}):
        with pytest.raises(InvalidRequest, match="no tokenizer; send prompt_token_ids"):
            parse(raw, text=None)
    assert parse({"prompt_token_ids": [1]}, text=None).prompt == (1,)
    with pytest.raises(InvalidRequest, match=r"messages: .*no chat template; send prompt"):
        parse({"messages": [{"role": "user", "content": "a"}]}, text=make_text(None))


def test_a_failing_template_names_messages() -> None:
    with pytest.raises(InvalidRequest, match=r"messages: .*only the user speaks"):
        parse({"messages": [{"role": "x", "content": "a"}]}, make_text("{{ raise_exception('only the user speaks') }}"))


def test_long_text_never_reaches_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(Tokenizer, "encode", never)
    wide = Limits(vocab_size=VOCAB, max_model_len=1 << 30, max_pool_tokens=1 << 30)
    size = 27 << 20
    for raw in ({"prompt": "a" * size}, {"messages": [{"role": "user", "content": "a" * size}]}):
        with pytest.raises(InvalidRequest, match=f"{size} bytes" if "prompt" in raw else "bytes"):
            parse(raw)
    with pytest.raises(InvalidRequest, match="max_prompt_bytes"):
        parse({"prompt": "é" * (17 << 20)}, limits=wide)
    with pytest.raises(InvalidRequest, match="max_prompt_bytes"):
        parse({"messages": [{"role": "user", "content": "a" * (17 << 20)}] * 2}, limits=wide)


def test_a_strange_field_name_is_cut_and_escaped() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(one(**{"x\n" * 5000: 1}))
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


# lines of a batch file


def test_lines_keep_their_numbers_and_blank_ones_are_none() -> None:
    found = list(parse_jsonl(['{"prompt": "a"}\n', "\n", '  {"n": 1}', "   "]))
    assert found == [(0, {"prompt": "a"}), (2, {"n": 1})]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting property name"),
        ("[1]", 'must be a JSON object; like {"prompt"'),
        ('"a"', "must be a JSON object"),
        ("null", "must be a JSON object"),
        ('{"a": 1} {"b": 2}', "Extra data"),
        ('{"a": 1, "b": 2, "a": 3}', "got 'a', must hold each key once"),
        ('{"a": {"b": 1, "b": 1}}', "got 'b', must hold each key once"),
        ("[" * 200_000, "RecursionError"),
        ('{"a":' * 100_000, "RecursionError"),
        ('{"seed": ' + "9" * 5000 + "}", "ValueError"),
        ("\ufeff{}", "BOM"),
        ("{'a': 1}", "Expecting property name"),
        ('{"a": "\x01"}', "Invalid control character"),
    ],
)
def test_a_bad_line_is_one_bad_request(line: str, words: str) -> None:
    found = list(parse_jsonl(['{"prompt": "a"}', line, '{"prompt": "b"}']))
    assert [number for number, _ in found] == [0, 1, 2]
    error = found[1][1]
    assert isinstance(error, InvalidRequest)
    assert str(error).startswith("line 2: got ")
    assert words in str(error)
    assert len(str(error)) < 250


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_constants_reach_the_validator(constant: str) -> None:
    [(_, raw)] = parse_jsonl([f'{{"prompt": "a", "temperature": {constant}}}'])
    assert isinstance(raw, dict)
    with pytest.raises(InvalidRequest, match=r"temperature: got -?(nan|inf), must be a number from 0 to 100"):
        parse(raw)


def test_an_escaped_surrogate_in_json_is_refused_by_its_place() -> None:
    [(_, raw)] = parse_jsonl([json.dumps({"prompt": "ab\ud800"})])
    assert isinstance(raw, dict)
    with pytest.raises(InvalidRequest, match=r"prompt: .*lone surrogate at character 2"):
        parse(raw)


def test_text_costs_no_torch() -> None:
    import subprocess

    code = "import sys, cluster.requests; print([x for x in ('torch', 'kernels', 'worker', 'ray') if x in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
