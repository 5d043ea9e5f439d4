"""The cases of `quire bench` are, to the token, those that the peers were measured with."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest

from launch.bench import Case, Options, Stopwatch, measure, summary
from launch.config import EngineConfig
from pagetable.errors import ConfigError
from pagetable.sampling import Request


def digest(case: str, repeat: str) -> str:
    return hashlib.sha256(json.dumps(Case.parse(case).jobs(repeat)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("prefill", "3bd330172852f5cb"),
        ("prefill:77", "feb4f1cc34441273"),
        ("decode:3", "db6763c5ab0fc8d9"),
        ("mixed:5", "2baff4315c7ede88"),
        ("prefix:3", "306fd561574f62e3"),
        ("prefixwarm:2", "e1844a11ce0e0ae4"),
        ("noprefix:4", "df2a103e06706585"),
        ("long:2000", "48e9d9ae3a3b9b35"),
    ],
)
def test_a_case_has_the_tokens_of_the_peers(case: str, expected: str) -> None:
    assert digest(case, "0") == expected


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        ("prefill", (2304, 64, False)),
        ("decode:8", (2304, 64, False)),
        ("mixed", (2304, 64, False)),
        ("noprefix", (2304, 64, False)),
        ("prefix", (2304, 64, True)),
        ("prefixwarm", (2304, 64, True)),
        ("long:5000", (5064, 1, False)),
    ],
)
def test_a_case_says_which_engine_it_needs(case: str, engine: tuple[int, int, bool]) -> None:
    config = Case.parse(case).configure(EngineConfig("m", block_size=32))
    assert (config.max_model_len, config.max_num_seqs, config.enable_prefix_caching) == engine
    assert config.block_size == 32


def test_warm_ups_are_cut_down_where_a_run_is_long() -> None:
    def shape(case: str) -> list[tuple[int, int]]:
        return [(len(prompt), count) for prompt, count in Case.parse(case).warm_jobs("w")]

    assert shape("prefill:40") == [(40, 1)]
    assert shape("decode:2") == [(128, 16), (128, 16)]
    assert shape("long:3000") == [(1024, 8)]
    assert shape("prefix:9") == [(1056, 64)] * 4
    assert len(shape("mixed:9")) == 4


@pytest.mark.parametrize("text", ["", "fast", "decode:0", "decode:-1", "decode:x", "decode:99999999", "decode:1:2"])
def test_an_unknown_case_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Case.parse(text)
    assert str(caught.value).startswith(f"--case: got {text!r}, must ")


def test_options_are_bounded() -> None:
    with pytest.raises(ConfigError, match=r"^--repeats: got 0, must be from 1 to 1000$"):
        Options("decode", repeats=0)
    with pytest.raises(ConfigError, match=r"^--quiet: got nan, must be from 0 to 3600 seconds$"):
        Options("decode", quiet=float("nan"))


class EchoLoop:
    """One token of each running request a step, and outputs without one, as the engine's loop may give them."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.left: dict[str, int] = {}

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.left[request.request_id] = request.params.max_tokens or 0

    @property
    def has_work(self) -> bool:
        return any(self.left.values())

    def step(self) -> list[SimpleNamespace]:
        running = [name for name, left in self.left.items() if left]
        for name in running:
            self.left[name] -= 1
        ends = [SimpleNamespace(request_id=name, token=None, failure="") for name in running]
        return ends + [SimpleNamespace(request_id=name, token=7, failure="") for name in running]


class Engine:
    def __init__(self) -> None:
        self.loop = EchoLoop()


def test_a_measure_counts_every_token_and_warms_the_prefix_first() -> None:
    engine = Engine()
    found = measure(Stopwatch(engine), Case("prefixwarm", 3), 0, 0.0)  # type: ignore[arg-type]
    warm, *timed = engine.loop.requests
    assert [request.params.max_tokens for request in engine.loop.requests] == [2, 64, 64, 64]
    assert all(request.prompt[:1024] == warm.prompt[:1024] for request in timed)
    assert all(request.params.temperature == 0 and request.params.ignore_eos for request in timed)
    assert found["value"] == pytest.approx(192 / found["total_s"])
    assert 0 < found["ttft_p50"] <= found["ttft_p99"] <= found["ttft_max"] <= found["total_s"]


def test_a_summary_reports_the_median_run_and_all_values() -> None:
    runs = [
        {"value": value, "per_cpu_s": value / 2, "foreign": 0.1 * value, "ttft_p50": value} for value in (4.0, 1.0, 2.0)
    ]
    line = summary(Case("decode", 1), EngineConfig("/models/tiny/", dtype="float32", threads=1), runs)
    assert (line["case"], line["model"], line["dtype"], line["threads"]) == ("decode:1", "tiny", "float32", 1)
    assert (line["value"], line["best"], line["cleanest"], line["spread"]) == (2.0, 4.0, 1.0, 0.75)
    assert (line["runs"], line["foreign"], line["ttft_p50"]) == ([4.0, 1.0, 2.0], [0.4, 0.1, 0.2], 2.0)
