"""Hardware: the constants of one kind of device, from which `cost.py` predicts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from pagetable.errors import ConfigError

KINDS = ("cpu", "gpu")
COLLECTIVES = ("exchange", "ring")
_MAY_BE_ZERO = (
    "layer_s",
    "barrier_s",
    "step_s",
    "row_s",
    "plan_s",
    "exchange_s",
    "network_exchange_s",
    "reserve_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates are per second, `_s` are seconds; products and attention are in bfloat16.

    Attributes:
        kind: "cpu", whose device is one core, or "gpu".
        devices_per_host: that share `exchange_*` links and `host_read_bytes_per_s`; beyond them `network_*` holds.
        memory_bytes: that a device may use, of which `reserve_bytes` are taken before weights and pages.
        read_bytes_per_s: of memory, by one device alone; host_read_bytes_per_s: by all devices of a host at once.
        product_flops: (rows, rate) of a product with weights beyond the caches, by the rows of its left side. Between
            two of them its time is linear in the rows; beyond the last the rate is the last's.
        float32_share: what is left of the rates of products and attention in float32.
        elements_per_s: of activations through norms, rotation and conversion.
        attention_read_share: of the read rate, that attention reaches on keys and values.
        attention_decode_flops, attention_prefill_flops: where multiplying, not reading, is the limit.
        layer_s: of starting a layer's kernels; barrier_s: of threads of one rank that wait for each other.
        step_s, row_s: of planning and sampling by the leader, for a step and for each of its rows; plan_s: of a
            plan to one rank more, on either side, and of a result.
        collective: "exchange" (each rank reads what all wrote) or "ring".
        exchange_s, exchange_bytes_per_s: of a collective between devices of a host, with what they wait for each other
            in it, and of a hand-over.
        activation_bytes: of one number that ranks sum or hand over.
        threads: cores that make a device.
    """

    kind: str
    devices_per_host: int
    memory_bytes: float
    reserve_bytes: float
    read_bytes_per_s: float
    host_read_bytes_per_s: float
    product_flops: tuple[tuple[int, float], ...]
    float32_share: float
    elements_per_s: float
    attention_read_share: float
    attention_decode_flops: float
    attention_prefill_flops: float
    layer_s: float
    barrier_s: float
    step_s: float
    row_s: float
    plan_s: float
    collective: str
    exchange_s: float
    exchange_bytes_per_s: float
    network_exchange_s: float
    network_bytes_per_s: float
    activation_bytes: int
    threads: int = 1

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("collective", COLLECTIVES)):
            if getattr(self, name) not in choices:
                raise ConfigError(name, getattr(self, name), f"be one of {', '.join(choices)}")
        for field in dataclasses.fields(self):
            if field.type in ("float", "int"):
                self._check_number(field.name, getattr(self, field.name))
        rows = [each for each, _ in self.product_flops]
        if rows[:1] != [1] or rows != sorted(set(rows)):
            raise ConfigError("product_flops", rows, "name rates by numbers of rows that grow from 1")
        for each, rate in self.product_flops:
            self._check_number(f"product_flops of {each} rows", rate)

    def _check_number(self, name: str, value: float) -> None:
        if not (math.isfinite(value) and (value > 0 or (value == 0 and name in _MAY_BE_ZERO))):
            raise ConfigError(name, value, f"be a finite number {'from' if name in _MAY_BE_ZERO else 'above'} 0")
        if name.endswith("_share") and value > 1:
            raise ConfigError(name, value, "be at most 1: it is a share")

    def of_threads(self, threads: int) -> Hardware:
        """The device that `threads` cores make together. ConfigError where a host has fewer, and for a GPU."""
        if self.kind != "cpu" and threads != 1:
            raise ConfigError("threads", threads, "be 1 where the device is a GPU", "leave it out")
        if not 1 <= threads <= self.devices_per_host:
            raise ConfigError("threads", threads, f"be from 1 to the {self.devices_per_host} cores of a host")
        return dataclasses.replace(
            self,
            devices_per_host=self.devices_per_host // threads,
            memory_bytes=self.memory_bytes * threads,
            read_bytes_per_s=min(self.read_bytes_per_s * threads, self.host_read_bytes_per_s),
            product_flops=tuple((rows, rate * threads) for rows, rate in self.product_flops),
            elements_per_s=self.elements_per_s * threads,
            attention_decode_flops=self.attention_decode_flops * threads,
            attention_prefill_flops=self.attention_prefill_flops * threads,
            threads=threads,
        )
