"""`quire plan`: which layout of a model on N devices is predicted to be quickest, and what it needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.commands import note
from launch.config import DEFAULTS, SETTINGS, Setting
from launch.flags import Parser, UsageError, flag_of
from launch.hardware_file import known_hardware, read_hardware, to_yaml
from launch.machine import CpuMeter
from launch.models.catalog import resolve
from pagetable.cost import Cost, Memory, Model, Prediction, Stage, Ways, Workload
from pagetable.errors import ConfigError, ModelError
from pagetable.hardware import Hardware
from worker.fields import Fields, read_object
from worker.layout import Layout
from worker.model_config import MAX_JSON_BYTES, ModelConfig

DEFAULT_HARDWARE = "cpu-zen5-2core"
MAX_DEVICES = 1024
MAX_CONTEXT, MAX_BATCH, MAX_TOP = 1 << 24, 1 << 20, 1000
_QUIET = 0.1  # share of the machine that others may take while it is measured
GOALS = ("decode", "prefill", "ttft")
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "page_parallel_size", "data_parallel_size")
_SHARED = ("dtype", "kv_cache_dtype", "block_size", "max_num_batched_tokens")  # settings of an engine that matter here
_NEEDED = ("model", "devices", "context", "batch")
_SCALE_BYTES = 4  # of a token and head in int8 pages, as kernels.int8 says

_DESCRIPTION = """\
Predicts, without running anything, how fast each layout of a model on N devices decodes --batch sequences that have
--context tokens each, how fast it reads prompts of that length, and what memory it takes. MODEL is a model folder (its
config.json is all that is read), a config.json, or the name of a bundled model. docs/plan.md says what is modelled.
With --measure it writes the hardware file of this machine instead."""


def add_plan_flags(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model folder, config.json, or a bundled model")
    parser.add_argument("--devices", metavar="N", help=f"GPUs, or CPU ranks of --threads cores; 1 to {MAX_DEVICES}")
    parser.add_argument("--context", metavar="L", help="tokens of each sequence")
    parser.add_argument("--batch", metavar="B", help="sequences that run at once, over all replicas")
    text = f"a table's name ({', '.join(known_hardware())}) or file; default: {DEFAULT_HARDWARE}"
    parser.add_argument("--hardware", metavar="FILE", help=text)
    parser.add_argument("--threads", metavar="N", help="cores of a CPU rank; default: 1")
    parser.add_argument("--goal", metavar="|".join(GOALS), help=f"what comes first in the table; default: {GOALS[0]}")
    parser.add_argument("--top", metavar="K", help="layouts to show; default: 5")
    parser.add_argument("--json", action="store_true", help="one JSON object, with what takes the time")
    parser.add_argument("--measure", action="store_true", help="measure this machine's cores; takes fifteen seconds")
    parser.add_argument("--output", metavar="FILE", help="of --measure; default: standard output")
    fixed = parser.add_argument_group("layout", "Only layouts with these sizes; what is not given is searched.")
    for name in _SIZES:
        short = SETTINGS[name].short if name in SETTINGS else ""
        fixed.add_argument(flag_of(name), *([short] if short else []), metavar="N")
    engine = parser.add_argument_group("engine", "As for `quire serve`.")
    for name in _SHARED:
        engine.add_argument(flag_of(name), metavar="|".join(map(str, SETTINGS[name].choices)) or "N")


def plan(found: argparse.Namespace) -> int:
    """The command. UsageError and ConfigError say which flag is at fault."""
    if found.measure:
        return _measure(found)
    if found.output is not None:
        raise UsageError("--output: stands with --measure only; redirect standard output instead")
    for name in _NEEDED:
        if getattr(found, name) is None:
            raise UsageError(
                f"{name if name == 'model' else flag_of(name)}: missing; say for example "
                "`quire plan story --devices 2 --context 1024 --batch 8`"
            )
    question = Question.of(found)
    answer = question.answer()
    top = _number(found.top, "--top", 1, MAX_TOP, 5)
    print(json.dumps(answer.to_json(top)) if found.json else "\n".join(answer.lines(top)))
    return 0


def _measure(found: argparse.Namespace) -> int:
    given = [
        name
        for name in (*_NEEDED, "hardware", "threads", "goal", "top", *_SIZES, *_SHARED)
        if getattr(found, name) is not None
    ]
    if given or found.json:
        name = given[0] if given else "json"
        shown = "MODEL" if name == "model" else flag_of(name)
        raise UsageError(f"{shown}: stands without --measure, which asks nothing of a model; drop one of the two")
    from launch.measure import SOURCES, measure

    meter = CpuMeter()
    hardware = measure(say=lambda text: note(f"measuring {text}"))
    others = meter.read()[1]
    if others > _QUIET:
        note(f"other programs took {others:.0%} of the machine meanwhile: measure again when it is idle")
    text = "# This machine, by `quire plan --measure`.\n" + to_yaml(hardware, SOURCES)
    if found.output is None:
        print(text, end="")
        return 0
    try:
        Path(found.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output: cannot write {found.output}: {error.strerror}") from error
    return 0


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, checked.

    Attributes:
        sizes: the layout's sizes that are fixed, by flag's name.
        dtype: float32 or bfloat16, `auto` resolved.
        kv_row_bytes: of one token's K (or V) of one head.
    """

    name: str
    model: ModelConfig
    hardware_name: str
    hardware: Hardware
    devices: int
    load: Workload
    sizes: dict[str, int]
    goal: str
    dtype: str
    kv_row_bytes: int

    @classmethod
    def of(cls, found: argparse.Namespace) -> Question:
        model = read_model(found.model)
        shared = {name: _setting(name, getattr(found, name)) for name in _SHARED}
        dtype = str(shared["dtype"])
        if dtype == "auto":
            dtype = "float32" if model.dtype == "float32" else "bfloat16"
        item = 4 if dtype == "float32" else 2
        row = model.head_dim + _SCALE_BYTES if shared["kv_cache_dtype"] == "int8" else model.head_dim * item
        name = found.hardware or DEFAULT_HARDWARE
        hardware = read_hardware(name)
        threads = _number(found.threads, "--threads", 1, 1024, 1)
        if found.threads is not None:
            try:
                hardware = hardware.of_threads(threads)
            except ConfigError as error:
                raise ConfigError("--threads", threads, error.limit, error.cure) from None
        goal = found.goal or GOALS[0]
        if goal not in GOALS:
            raise UsageError(f"--goal: got {goal!r}, must be one of {', '.join(GOALS)}")
        return cls(
            name=found.model,
            model=model,
            hardware_name=name,
            hardware=hardware,
            devices=_number(found.devices, "--devices", 1, MAX_DEVICES),
            load=Workload(
                context=_number(found.context, "--context", 1, MAX_CONTEXT),
                batch=_number(found.batch, "--batch", 1, MAX_BATCH),
                chunk=_int(shared["max_num_batched_tokens"]),
                block_size=_int(shared["block_size"]),
            ),
            sizes={
                name: _number(getattr(found, name), flag_of(name), 1, MAX_DEVICES)
                for name in _SIZES
                if getattr(found, name) is not None
            },
            goal=goal,
            dtype=dtype,
            kv_row_bytes=row,
        )

    def answer(self) -> Answer:
        """All layouts that fit, the best first. ConfigError where none is possible, and where none fits."""
        every = [self.cost(ways) for ways in self._ways(self.devices)]
        if not every:
            self._refuse_all()
        fitting = [cost for cost in every if cost.memory(self.load).total <= self.hardware.memory_bytes]
        if not fitting:
            self._refuse_memory(min((cost.memory(self.load) for cost in every), key=lambda each: each.total))
        found = [cost.predict(self.load) for cost in fitting]
        return Answer(self, sorted(found, key=self._rank), len(every) - len(fitting))

    def cost(self, ways: Ways) -> Cost:
        """The model of one possible layout."""
        model, item = self.model, 4 if self.dtype == "float32" else 2
        parts = Layout(ways.tensor, ways.pipeline, ways.page).parts(model)
        stages = []
        for stage in range(ways.pipeline):
            ranks = parts[stage * ways.tensor : (stage + 1) * ways.tensor]
            largest = max(ranks, key=lambda part: part.weight_bytes(model, item))
            mlp = max(len(part.mlp) for part in ranks)
            even = parts[(stage - 1) * ways.tensor].border_even if stage else 0  # of the border to the stage before
            stages.append(
                Stage(
                    windows=tuple(model.windows[layer] for layer in largest.layers),
                    heads=len(largest.heads),
                    attended=len(largest.attended),
                    kv_heads=len(largest.kv_heads),
                    mlp=mlp,
                    head_rows=max(len(part.vocab) for part in ranks) if largest.is_last else 0,
                    weight_bytes=largest.weight_bytes(model, item),
                    left_mlp=mlp - max(len(part.last_mlp) for part in ranks),
                    carried_mlp=max(len(part.carried_mlp) for part in ranks) + sum(map(len, largest.border_in[even:])),
                    border_in=sum(map(len, largest.border_in[:even])),
                    border_out=sum(map(len, largest.border_out[: largest.border_even])),
                )
            )
        numbers = Model(model.hidden_size, model.head_dim, item, self.kv_row_bytes)
        return Cost(self.hardware, numbers, ways, stages)

    def _ways(self, devices: int) -> Iterator[Ways]:
        """Every possible layout that uses all of them; no replica goes without a sequence."""
        for tensor in _divisors(devices):
            for pipeline in _divisors(devices // tensor):
                data = devices // tensor // pipeline
                for page in _divisors(tensor):
                    sizes = dict(zip(_SIZES, (tensor, pipeline, page, data), strict=True))
                    if any(sizes[name] != wanted for name, wanted in self.sizes.items()):
                        continue
                    if data <= self.load.batch and Layout(tensor, pipeline, page).is_possible(self.model):
                        yield Ways(tensor, pipeline, page, data)

    def _rank(self, each: Prediction) -> tuple[float, ...]:
        """Best first; of equals the simpler layout."""
        speed = {"decode": -each.decode_tokens_per_s, "prefill": -each.prefill_tokens_per_s, "ttft": each.ttft_s}
        ways = each.ways
        return (float(f"{speed[self.goal]:.3g}"), ways.pipeline, ways.page, ways.tensor)

    def _refuse_all(self) -> None:
        fixed = " ".join(f"{flag_of(name)} {size}" for name, size in self.sizes.items())
        sizes = [n for n in range(1, MAX_DEVICES + 1) if next(self._ways(n), None) is not None]
        if not sizes and self.sizes:  # the layout itself cannot be: its own words say why
            shape = [self.sizes.get(name, 1) for name in _SIZES[:3]]
            Layout(*shape).check(self.model)
        possible = ", ".join(map(str, sizes[:12])) + (", ..." if len(sizes) > 12 else "")
        limit = f"be a number that {fixed or 'some layout'} of this model with {self.load.batch} sequences can use"
        raise ConfigError("--devices", self.devices, limit, f"possible: {possible or 'none'}")

    def _refuse_memory(self, least: Memory) -> None:
        """With the numbers of the layout that needs least, and how many devices would do."""
        have = self.hardware.memory_bytes
        larger = (self.devices << doublings for doublings in range(1, MAX_DEVICES.bit_length()))
        enough = next((n for n in larger if n <= MAX_DEVICES and self._fits(n)), None)
        more = f"take {enough} devices, or " if enough else ""
        raise ConfigError(
            "--devices",
            self.devices,
            f"hold {_about(least.total)} on a device at least: {_about(least.weights)} of weights, "
            f"{_about(least.pages)} of pages for {self.load.batch} x {self.load.context} tokens and "
            f"{_about(least.working + least.reserve)} to work with; one of {self.hardware_name} has {_about(have)}",
            f"{more}lower --batch or --context",
        )

    def _fits(self, devices: int) -> bool:
        return any(
            self.cost(ways).memory(self.load).total <= self.hardware.memory_bytes for ways in self._ways(devices)
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The layouts that fit, best first.

    Attributes:
        too_large: how many layouts are left out for want of memory.
    """

    question: Question
    predictions: list[Prediction]
    too_large: int

    def lines(self, top: int) -> list[str]:
        """A table for people."""
        asked = self.question
        rows: list[tuple[str, ...]] = [_HEADER]
        for each in self.predictions[:top]:
            ways = each.ways
            sizes = (ways.tensor, ways.pipeline, ways.page, ways.data)
            rows.append(
                (
                    *map(str, sizes),
                    _digits(each.decode_tokens_per_s),
                    _digits(each.step_s * 1e3),
                    _digits(each.prefill_tokens_per_s),
                    _digits(each.ttft_s),
                    _about(each.memory.total),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        load = asked.load
        threads = f", {asked.hardware.threads} threads a rank" if asked.hardware.threads > 1 else ""
        return [
            f"Predicted, not measured: {asked.name} ({asked.dtype}) on {asked.devices} x {asked.hardware_name}{threads}"
            f", {_counted(load.batch, 'sequence')} of {_counted(load.context, 'token')}",
            *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
            f"T tensor, P pipeline, G page, D data parallel; {_counted(len(self.predictions), 'layout')} within "
            f"{_about(asked.hardware.memory_bytes)} a device"
            + (f", {self.too_large} more would need too much" if self.too_large else ""),
            f"suggested: {_flags(self.predictions[0].ways)}",
            *(f"note: {note}" for note in self.notes),
        ]

    @property
    def notes(self) -> list[str]:
        limit = self.question.model.max_position_embeddings
        if self.question.load.context <= limit:
            return []
        return [f"the model's max_position_embeddings is {limit}; `quire serve` refuses longer sequences"]

    def to_json(self, top: int) -> dict[str, Any]:
        asked = self.question
        return {
            "model": asked.name,
            "dtype": asked.dtype,
            "hardware": asked.hardware_name,
            "threads": asked.hardware.threads,
            "devices": asked.devices,
            "context": asked.load.context,
            "batch": asked.load.batch,
            "memory_bytes": asked.hardware.memory_bytes,
            "fitting": len(self.predictions),
            "too_large": self.too_large,
            "layouts": [_object(each) for each in self.predictions[:top]],
            "suggested": _flags(self.predictions[0].ways),
            "notes": self.notes,
        }


_HEADER = ("T", "P", "G", "D", "decode tok/s", "step ms", "prefill tok/s", "TTFT s", "memory")


def read_model(name: str) -> ModelConfig:
    """From a model folder, a bundled model's name, or a file config.json. ModelError as `ModelConfig.from_folder`."""
    path = Path(resolve(name))
    if path.suffix != ".json":
        return ModelConfig.from_folder(path)
    try:
        values = read_object(path, MAX_JSON_BYTES)
    except OSError as error:
        raise ModelError(f"model: {name} cannot be read ({error.strerror})") from None
    return ModelConfig.from_fields(Fields(values, path.name), Fields({}, "generation_config.json"))


def _object(each: Prediction) -> dict[str, Any]:
    ways, memory, times = each.ways, each.memory, each.slowest
    return {
        "tensor_parallel_size": ways.tensor,
        "pipeline_parallel_size": ways.pipeline,
        "page_parallel_size": ways.page,
        "data_parallel_size": ways.data,
        "decode_tokens_per_s": _rounded(each.decode_tokens_per_s),
        "prefill_tokens_per_s": _rounded(each.prefill_tokens_per_s),
        "step_s": _rounded(each.step_s),
        "ttft_s": _rounded(each.ttft_s),
        "memory_bytes": {
            "total": round(memory.total),
            **{name: round(getattr(memory, name)) for name in ("weights", "pages", "working", "reserve")},
        },
        "micro_batches": each.num_micro_batches,
        "rows": each.rows,
        "slowest_stage_s": {
            name: _rounded(getattr(times, name))
            for name in ("products", "elements", "attention", "collectives", "head", "overhead")
        },
    }


def _flags(ways: Ways) -> str:
    sizes = dict(zip(_SIZES, (ways.tensor, ways.pipeline, ways.page, ways.data), strict=True))
    given = [f"{flag_of(name)} {size}" for name, size in sizes.items() if size != 1]
    return " ".join(given) or f"{flag_of(_SIZES[0])} 1"


def _setting(name: str, text: str | None) -> object:
    """An engine's setting by the rules that `quire serve` has."""
    if text is None:
        return DEFAULTS[name]
    known, flag = SETTINGS[name], flag_of(name)
    value = known.parse(flag, text)
    known.check(flag, value)
    return value


def _number(text: str | None, flag: str, low: int, high: int, default: int | None = None) -> int:
    if text is None:
        assert default is not None, flag
        return default
    known = Setting(kind="int", help="", low=low, high=high)
    value = known.parse(flag, text)
    known.check(flag, value)
    assert isinstance(value, int)
    return value


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _rounded(value: float) -> float:
    """Four digits: constants have three."""
    return float(f"{value:.4g}")


def _digits(value: float) -> str:
    """Three digits, for people: `1,230`, `45.6`, `0.0123`."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"


def _about(count: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    units = ["MiB", "GiB", "TiB", "PiB"]
    value = count / (1 << 20)
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.1f} {units[0]}"
