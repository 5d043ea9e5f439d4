"""Plans and results as bytes, between the ranks of one shard.

    plan      number (8) | how long each array is (4 each), how many columns those by column have, how many admits
              | how long each column is | all arrays, int32 | all columns | admits, each ...
    result    number (8) | how many tokens, logprobs, scores, failures (4 each) | tokens, int32 | the others, each ...

Little-endian throughout. A reader checks every length against what is there: bytes that end early or late, or that no
encoder made, are a BadFrame. The format is private to one version: all ranks of a shard run the same. Native code reads
plans and writes results, too (kernels/csrc/rank.cpp).
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import chain
from operator import attrgetter
from typing import Any

from pagetable.frames import BadFrame
from pagetable.ids import PlanNumber, SequenceId
from pagetable.sampling import SamplingParams
from worker.plan import Admit, Plan, StepResult, TokenLogprobs

_ARRAYS = (
    "slots",
    "query_start",
    "first_position",
    "tokens",
    "table_slot",
    "table_index",
    "table_group",
    "copy_from",
    "copy_to",
    "sample_row",
    "sample_slot",
    "sample_position",
    "score_row",
    "score_slot",
    "score_token",
)
_BY_COLUMN = ("table_blocks", "copy_sources", "copy_targets")
_arrays_of, _columns_of = attrgetter(*_ARRAYS), attrgetter(*_BY_COLUMN)
_COUNT = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
_RESULT = struct.Struct("<Q4I")
_PLAN = struct.Struct(f"<Q{len(_ARRAYS) + len(_BY_COLUMN) + 1}I")
_ADMIT = struct.Struct("<iQii")
_LOGPROBS = struct.Struct("<dii")
_TOP = struct.Struct("<id")
_ITEM = 4
_PLAIN = SamplingParams()
_DEFAULTS = tuple((each.name, getattr(_PLAIN, each.name)) for each in fields(SamplingParams))
_TUPLES = ("stop", "stop_token_ids")

if sys.byteorder != "little" or array("i").itemsize != _ITEM:  # pragma: no cover
    raise ImportError("ranks exchange int32 little-endian; this machine's int is another")


class Writer:
    """Collects parts; `bytes()` joins them once."""

    def __init__(self) -> None:
        self.parts: list[bytes | array[int]] = []

    def pack(self, form: struct.Struct, *values: float) -> None:
        self.parts.append(form.pack(*values))

    def ints(self, values: array[int]) -> None:
        self.parts.append(_COUNT.pack(len(values)))
        self.parts.append(values)

    def blob(self, data: bytes) -> None:
        self.parts.append(_COUNT.pack(len(data)))
        self.parts.append(data)

    def bytes(self) -> bytes:
        return b"".join(self.parts)


class Reader:
    """Takes parts off the front; BadFrame where the bytes are not there."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self._take(form.size))

    def count(self) -> int:
        (value,) = _COUNT.unpack(self._take(_COUNT.size))
        return int(value)

    def ints(self) -> array[int]:
        return self.numbers("i", self.count())

    def many(self, counts: Sequence[int]) -> list[array[int]]:
        """Arrays that lie one behind the other, of so many numbers each."""
        whole, found, end = self.numbers("i", sum(counts)), [], 0
        for count in counts:
            found.append(whole[end : end + count])
            end += count
        return found

    def numbers(self, kind: str, count: int) -> array[int]:
        values = array(kind)
        values.frombytes(self._take(count * _ITEM))
        return values

    def blob(self) -> bytes:
        return self._take(self.count())

    def end(self) -> None:
        if self._at != len(self._data):
            raise BadFrame(f"{len(self._data) - self._at} bytes behind the end of a plan or result")

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise BadFrame(f"a plan or result ends {size - len(taken)} bytes early")
        self._at += size
        return taken


def encode_plan(plan: Plan) -> bytes:
    """What `decode_plan` reads back equal."""
    out = Writer()
    arrays, by_column = _arrays_of(plan), _columns_of(plan)
    columns = tuple(chain(*by_column))
    out.pack(_PLAN, plan.number, *map(len, arrays), *map(len, by_column), len(plan.admits))
    out.parts += (array("I", map(len, columns)), *arrays, *columns)
    for admit in plan.admits:
        out.pack(_ADMIT, admit.slot, admit.sequence_id, admit.sample_index, admit.prompt_length)
        out.blob(_encode_params(admit.params))
        out.ints(admit.tokens)
        out.ints(array("i", admit.eos_token_ids))
    return out.bytes()


def decode_plan(data: bytes) -> Plan:
    """Raises BadFrame."""
    read = Reader(data)
    number, *counts, num_blocks, num_sources, num_targets, num_admits = read.unpack(_PLAN)
    counts += read.numbers("I", num_blocks + num_sources + num_targets)
    arrays = read.many(counts)
    columns = arrays[len(_ARRAYS) :]
    values: dict[str, Any] = dict(zip(_ARRAYS, arrays, strict=False))
    values["table_blocks"] = columns[:num_blocks]
    values["copy_sources"] = columns[num_blocks : num_blocks + num_sources]
    values["copy_targets"] = columns[num_blocks + num_sources :]
    plan = Plan(PlanNumber(number), **values)
    for _ in range(num_admits):
        slot, sequence, sample_index, prompt_length = map(int, read.unpack(_ADMIT))
        params = _decode_params(read.blob())
        tokens, eos = read.ints(), tuple(read.ints())
        plan.admits.append(Admit(slot, SequenceId(sequence), sample_index, params, prompt_length, tokens, eos))
    read.end()
    return plan


def plan_number(data: bytes) -> PlanNumber:
    """Of an encoded plan, which may yet be none. Raises BadFrame."""
    return PlanNumber(Reader(data).unpack(_NUMBER)[0])


def _encode_params(params: SamplingParams) -> bytes:
    """As JSON, what differs from the defaults: a step can admit hundreds."""
    values = {name: value for name, default in _DEFAULTS if (value := getattr(params, name)) != default}
    if "logit_bias" in values:
        values["logit_bias"] = list(values["logit_bias"].items())
    return json.dumps(values).encode()


def _decode_params(data: bytes) -> SamplingParams:
    try:
        values = json.loads(data)
        if "logit_bias" in values:
            values["logit_bias"] = {int(token): float(bias) for token, bias in values["logit_bias"]}
        for name in _TUPLES:
            if name in values:
                values[name] = tuple(values[name])
        return SamplingParams(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadFrame(f"no sampling parameters ({type(error).__name__})") from None


def encode_result(result: StepResult) -> bytes:
    """What `decode_result` reads back equal."""
    tokens, logprobs, scores, failed = result.tokens, result.logprobs, result.scores, result.failed
    head = _RESULT.pack(result.number, len(tokens), len(logprobs), len(scores), len(failed))
    if not (logprobs or scores or failed):
        return head + tokens.tobytes()
    out = Writer()
    out.parts += (head, tokens, array("i", logprobs))
    _write_logprobs(out, logprobs.values())
    _write_logprobs(out, scores)
    out.parts.append(array("i", failed))
    for why in failed.values():
        out.blob(why.encode())
    return out.bytes()


def decode_result(data: bytes) -> StepResult:
    """Raises BadFrame."""
    read = Reader(data)
    number, num_tokens, num_logprobs, num_scores, num_failed = map(int, read.unpack(_RESULT))
    result = StepResult(PlanNumber(number), read.numbers("i", num_tokens))
    if num_logprobs or num_scores or num_failed:
        entries = read.numbers("i", num_logprobs)
        result.logprobs = {entry: _read_logprobs(read) for entry in entries}
        result.scores = [_read_logprobs(read) for _ in range(num_scores)]
        result.failed = {entry: read.blob().decode(errors="replace") for entry in read.numbers("i", num_failed)}
    read.end()
    return result


def _write_logprobs(out: Writer, many: Iterable[TokenLogprobs]) -> None:
    for each in many:
        out.pack(_LOGPROBS, each.logprob, each.rank, len(each.top))
        for token, logprob in each.top:
            out.pack(_TOP, token, logprob)


def _read_logprobs(read: Reader) -> TokenLogprobs:
    logprob, rank, num_top = read.unpack(_LOGPROBS)
    top = tuple((int(token), value) for token, value in (read.unpack(_TOP) for _ in range(int(num_top))))
    return TokenLogprobs(logprob, int(rank), top)
