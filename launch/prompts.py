"""Lines in, lines out: a batch of requests as JSON lines, and its results as JSON lines in the same order."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cluster.requests import parse_jsonl
from pagetable.errors import FieldError, InvalidRequest, QuireError

if TYPE_CHECKING:
    from launch.llm import CompletionOutput, RequestOutput
    from worker.plan import TokenLogprobs

Raw = Mapping[str, Any] | QuireError


def read_lines(lines: Iterable[bytes], defaults: Mapping[str, Any]) -> Iterator[Raw]:
    """One request for each line that is not blank; a line that is no JSON object becomes the error to answer with.

    A byte that is not UTF-8 becomes half a surrogate pair, which the validator refuses in whatever field it stands.

    Args:
        defaults: fields for lines that do not say.
    """
    texts = (line.decode("utf-8", "surrogateescape") for line in lines)
    for _, found in parse_jsonl(texts):
        yield found if isinstance(found, InvalidRequest) else {**defaults, **found}


def result_line(index: int, result: RequestOutput | QuireError) -> dict[str, Any]:
    """What `--json` prints for request number `index`: always a list `outputs`, or `error`."""
    if isinstance(result, QuireError):
        field = result.field if isinstance(result, FieldError) else None
        return {"index": index, "error": {"code": result.code, "field": field, "message": str(result)}}
    line: dict[str, Any] = {
        "index": index,
        "request_id": result.request_id,
        "prompt_tokens": result.num_prompt_tokens,
        "cached_tokens": result.num_cached_tokens,
        "outputs": [_output(output) for output in result.outputs],
    }
    if result.prompt_logprobs is not None:
        line["prompt_logprobs"] = [_logprobs(entry) for entry in result.prompt_logprobs]
    return line


def has_failed(line: Mapping[str, Any]) -> bool:
    """Whether the request was refused or a sample of it died."""
    return "error" in line or any(output["finish_reason"] == "error" for output in line["outputs"])


def _output(output: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "index": output.index,
        "token_ids": list(output.token_ids),
        "text": output.text,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "pages": [list(page) for page in output.pages],
    }
    if output.logprobs is not None:
        found["cumulative_logprob"] = _finite(output.cumulative_logprob)
        found["logprobs"] = [_logprobs(entry) for entry in output.logprobs]
    return found


def _logprobs(entry: TokenLogprobs | None) -> dict[str, Any] | None:
    """None at the first token of a prompt, which nothing predicts."""
    if entry is None:
        return None
    top = [[token, _finite(logprob)] for token, logprob in entry.top]
    return {"logprob": _finite(entry.logprob), "rank": entry.rank, "top": top}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a probability of zero is null."""
    return value if value is not None and math.isfinite(value) else None


def to_text(line: Mapping[str, Any]) -> str:
    """One JSON line. Half a surrogate pair, which UTF-8 cannot hold, is written as JSON's own escape."""
    text = json.dumps(line, ensure_ascii=False, separators=(", ", ": "), allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
