"""JSON lines in and out: a bad line is answered in its place, and every result line is JSON."""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace

import pytest

from launch.prompts import has_failed, read_lines, result_line, to_text
from pagetable.errors import InvalidRequest, Overloaded
from worker.plan import TokenLogprobs


def test_lines_keep_their_order_and_take_the_defaults_they_lack() -> None:
    lines = [b'{"prompt": "a"}\n', b"\n", b'  {"prompt_token_ids": [1], "n": 3}', b""]
    assert list(read_lines(lines, {"n": 2, "top_p": 0.5})) == [
        {"prompt": "a", "n": 2, "top_p": 0.5},
        {"prompt_token_ids": [1], "n": 3, "top_p": 0.5},
    ]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"null", b'{"n": 1, "n": 2}', b"\xff", b"9" * 5000, b"[" * 200000])
def test_a_line_that_is_no_object_becomes_its_error_and_the_next_is_read(line: bytes) -> None:
    first, bad, last = read_lines([b"{}", line, b'{"n": 1}'], {"n": 2})
    assert (first, last) == ({"n": 2}, {"n": 1})
    assert isinstance(bad, InvalidRequest)
    assert bad.field == "line 2"
    assert len(str(bad)) < 200


def test_a_byte_that_is_no_utf_8_stays_visible_to_the_validator() -> None:
    assert list(read_lines([b'{"prompt": "a\xff"}'], {})) == [{"prompt": "a\udcff"}]


def test_an_error_line_names_code_and_field() -> None:
    assert result_line(4, InvalidRequest("top_p", 2, "be above 0 and at most 1")) == {
        "index": 4,
        "error": {
            "code": "INVALID_ARGUMENT",
            "field": "top_p",
            "message": "top_p: got 2, must be above 0 and at most 1",
        },
    }
    full = {"code": "RESOURCE_EXHAUSTED", "field": None, "message": "full"}
    assert result_line(0, Overloaded("full")) == {"index": 0, "error": full}


def test_a_result_line_has_its_outputs_and_pages_and_no_infinity() -> None:
    output = SimpleNamespace(
        index=0,
        token_ids=array("i", [5, 6]),
        text="é\ud800",
        finish_reason="stop",
        stop_reason=6,
        pages=[(0, 7), (0, 2)],
        cumulative_logprob=float("-inf"),
        logprobs=[TokenLogprobs(-0.5, 1, ((5, -0.5), (9, float("-inf"))))],
    )
    result = SimpleNamespace(
        request_id="r",
        num_prompt_tokens=3,
        num_cached_tokens=2,
        outputs=[output],
        prompt_logprobs=[None, TokenLogprobs(-1.5, 2, ())],
    )
    text = to_text(result_line(3, result))  # type: ignore[arg-type]
    assert text.encode("utf-8").decode("utf-8") == text
    assert "é\\ud800" in text
    assert json.loads(text) == {
        "index": 3,
        "request_id": "r",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "outputs": [
            {
                "index": 0,
                "token_ids": [5, 6],
                "text": "é\ud800",
                "finish_reason": "stop",
                "stop_reason": 6,
                "pages": [[0, 7], [0, 2]],
                "cumulative_logprob": None,
                "logprobs": [{"logprob": -0.5, "rank": 1, "top": [[5, -0.5], [9, None]]}],
            }
        ],
        "prompt_logprobs": [None, {"logprob": -1.5, "rank": 2, "top": []}],
    }


def test_a_request_has_failed_where_it_was_refused_or_a_sample_died() -> None:
    assert has_failed(result_line(0, Overloaded("full")))
    assert has_failed({"outputs": [{"finish_reason": "length"}, {"finish_reason": "error"}]})
    assert not has_failed({"outputs": [{"finish_reason": "length"}, {"finish_reason": "stop"}]})
