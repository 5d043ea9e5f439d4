"""The one configuration of an engine: its fields, their limits and their texts.

Flags, environment names, keys of a file and the help are all made from these fields (see `flags.py`), so that
they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from launch.machine import available_cores, has_whole_cores
from pagetable.errors import ConfigError, NotSupported
from pagetable.ids import MAX_BLOCKS
from worker.layout import Layout
from worker.ways import TABLE_BROADCASTS, Ways

UNITS = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_UNIT_OF = {name.lower(): factor for name, factor in UNITS.items()}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([a-z]*)", re.IGNORECASE | re.ASCII)
_INT = re.compile(r"[+-]?[0-9]{1,20}", re.ASCII)
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_size(name: str, text: str) -> int:
    """`"512MiB"` or `"1.5 GB"` in bytes. ConfigError where the unit is missing or unknown."""
    found = _SIZE.fullmatch(text.strip())
    units = ", ".join(UNITS)
    if found is None or found[2].lower() not in _UNIT_OF:
        cure = f"say which unit, e.g. {found[1]}GiB" if found and not found[2] else "write for example 4GiB or 512MiB"
        raise ConfigError(name, text, f"be a size with a unit ({units})", cure)
    return int(Fraction(found[1]) * _UNIT_OF[found[2].lower()])


def show_size(count: int) -> str:
    """Bytes as the shortest exact text that `parse_size` reads back: `"4GiB"`."""
    exact = [f"{count // factor}{name}" for name, factor in UNITS.items() if count % factor == 0]
    return min(exact, key=len)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is known of one field: how its text is read, what it may be, what its help says.

    Attributes:
        kind: `text`, `int`, `size` (bytes as int; a size with a unit as text), `bool` or `choice`.
        low, high: bounds of a number, both allowed.
        choices: if not empty, the only allowed values.
        optional: None is allowed and means that the engine decides.
        short: a short spelling of the flag.
    """

    kind: str
    help: str
    low: int = 0
    high: int = 0
    choices: tuple[Any, ...] = ()
    optional: bool = False
    short: str = ""

    def check(self, name: str, value: object) -> None:
        """ConfigError where `value` may not be. `name` is as the user spelled it."""
        if value is None and self.optional:
            return
        if self.kind == "bool":
            good = isinstance(value, bool)
        elif self.kind in ("int", "size"):
            good = type(value) is int and (value in self.choices if self.choices else self.low <= value <= self.high)
        elif self.kind == "choice":
            good = isinstance(value, str) and value in self.choices
        else:
            good = isinstance(value, str) and value != "" and "\0" not in value
        if not good:
            raise ConfigError(name, value, f"be {self.allowed}", self._cure(value))

    @property
    def allowed(self) -> str:
        """The allowed values in words, to follow "must be"."""
        if self.kind == "bool":
            return "true or false"
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.kind == "size":
            return f"from {show_size(self.low)} to {show_size(self.high)}"
        if self.kind == "int":
            return f"a whole number from {self.low} to {self.high}"
        return "a text that is not empty"

    def _cure(self, value: object) -> str:
        if self.kind == "size" and isinstance(value, str):
            return "give bytes as an int, e.g. 4 << 30"
        return "leave it out to let the engine decide" if self.optional else ""

    def parse(self, name: str, text: str) -> object:
        """The value that a flag's or a variable's text stands for, not yet checked against the bounds."""
        if self.optional and text.strip().lower() in ("none", "null"):
            return None
        if self.kind == "int":
            return int(text) if _INT.fullmatch(text) else text
        if self.kind == "size":
            return parse_size(name, text)
        if self.kind == "bool":
            word = text.strip().lower()
            return True if word in _TRUE else False if word in _FALSE else text
        return text

    def from_yaml(self, name: str, value: object) -> object:
        """The value that a plain YAML value stands for: its type must fit, and a size needs its unit."""
        if self.kind == "size" and isinstance(value, str):
            return parse_size(name, value)
        if self.kind == "size" and isinstance(value, int):
            return parse_size(name, str(value))
        return value

    def show(self, value: object) -> object:
        """The value as a plain YAML value that `from_yaml` reads back."""
        return show_size(value) if self.kind == "size" and isinstance(value, int) else value


def setting(default: object, kind: str, help: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"setting": Setting(kind=kind, help=help, **more)})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that decides how an engine is built. vLLM's names where vLLM has them.

    Errors: ConfigError where a value may not be.
    """

    model: str = dataclasses.field(metadata={"setting": Setting(kind="text", help="folder of a Hugging Face model")})
    max_model_len: int | None = setting(
        None,
        "int",
        "prompt and output tokens of one sequence; default: the model's own",
        low=1,
        high=2**31 - 1,
        optional=True,
    )
    block_size: int = setting(16, "int", "tokens of one page", choices=tuple(1 << i for i in range(9)))
    num_gpu_blocks_override: int | None = setting(
        None, "int", "blocks of the pool, instead of what the memory says", low=1, high=MAX_BLOCKS, optional=True
    )
    kv_cache_memory_bytes: int | None = setting(
        None, "size", "memory of the pool; default: a share of what is free", low=1, high=1 << 50, optional=True
    )
    preallocate_kv_cache: bool = setting(
        False, "bool", "take the pool's memory at the start, not as pages are first written: no step waits for it"
    )
    max_num_seqs: int = setting(256, "int", "sequences that run at once", low=1, high=16384)
    max_num_batched_tokens: int = setting(1024, "int", "tokens of one step", low=1, high=1 << 20)
    max_num_partial_prefills: int = setting(8, "int", "prompts that prefill in chunks at once", low=1, high=1024)
    enable_prefix_caching: bool = setting(True, "bool", "share the pages of equal prefixes")
    deterministic: bool = setting(False, "bool", "equal bits whatever the batch, the chunks and the threads; slower")
    async_scheduling: bool = setting(
        False, "bool", "plan a step before the tokens that it begins with are known; ranks fill them in"
    )
    device: str = setting(
        "auto", "choice", "what models run on; auto is a GPU where there is one to use", choices=("auto", "cpu", "cuda")
    )
    dtype: str = setting(
        "auto", "choice", "of weights and pages; auto is the model's own", choices=("auto", "float32", "bfloat16")
    )
    kv_cache_dtype: str = setting(
        "auto", "choice", "of pages; auto is that of the weights, int8 takes about half", choices=("auto", "int8")
    )
    seed: int = setting(0, "int", "for requests that bring no seed", low=0, high=2**63 - 1)
    threads: int | None = setting(
        None, "int", "CPU threads of each rank; default: its share of the cores", low=1, high=1024, optional=True
    )
    pin_threads: bool = setting(True, "bool", "each of several ranks stays on cores of its own, where there are enough")
    tensor_parallel_size: int = setting(1, "int", "ranks that split each layer", low=1, high=1024, short="-tp")
    pipeline_parallel_size: int = setting(1, "int", "stages of layers", low=1, high=1024, short="-pp")
    page_parallel_size: int = setting(
        1, "int", "groups of tensor ranks over which a sequence's pages are spread", low=1, high=1024
    )
    data_parallel_size: int = setting(
        1, "int", "replicas of the model; more than one under `quire serve`", low=1, high=1024, short="-dp"
    )
    table_broadcast: str = setting(
        "auto",
        "choice",
        "how steps and their table changes reach the ranks of a shard; auto is shared memory on one host",
        choices=TABLE_BROADCASTS,
    )

    def __post_init__(self) -> None:
        for name, known in SETTINGS.items():
            known.check(name, getattr(self, name))
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "num_gpu_blocks_override",
                self.num_gpu_blocks_override,
                "stand without kv_cache_memory_bytes",
                "both size the pool: drop one of the two",
            )
        _ = self.layout  # refuses groups that do not divide the ranks

    @property
    def layout(self) -> Layout:
        """The ranks of a shard."""
        return Layout(self.tensor_parallel_size, self.pipeline_parallel_size, self.page_parallel_size)

    @property
    def ways(self) -> Ways:
        """How the ranks of a shard talk to each other."""
        return Ways(table_broadcast=self.table_broadcast)

    def check_one_process(self) -> None:
        """NotSupported where this configuration needs the processes of `quire serve`."""
        if self.data_parallel_size != 1:
            raise NotSupported(
                f"data_parallel_size: got {self.data_parallel_size}, must be 1; replicas are for `quire serve`"
            )

    @property
    def num_threads(self) -> int:
        """Of each rank: `threads`, or its share of the cores that this process may use."""
        return self.threads if self.threads is not None else max(1, available_cores() // self.layout.num_ranks)

    def pins(self, num_ranks: int, threads: int) -> bool:
        """Whether so many ranks shall each stay on their cores."""
        return self.pin_threads and self.layout.num_ranks > 1 and has_whole_cores(num_ranks * threads)


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in dataclasses.fields(EngineConfig)}
DEFAULTS: dict[str, object] = {
    f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(EngineConfig)
}
