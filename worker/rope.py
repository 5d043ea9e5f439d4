"""Rotary position embeddings: what config.json says, and the frequencies that follow from it.

Four kinds: default, linear, llama3 and yarn (arXiv 2309.00071), with transformers' formulas, but in float64.
Kinds whose frequencies follow the current length (dynamic, longrope) are refused: a key is written once, rotated,
and must stay right when its sequence grows. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pagetable.errors import ModelError, shown
from worker.fields import Fields

_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_MAX_LENGTH = 1 << 31
_MAX_FACTOR = 1e6


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding as one set of numbers, whichever way config.json spells it.

    Attributes:
        kind: default, linear, llama3 or yarn.
        theta: the base.
        factor: by how much positions are stretched.
        original_max_position_embeddings: the length that llama3 and yarn start from; 0 for the others.
        attention_factor: cosines and sines are multiplied by it (yarn; 1 for the others).
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_fields(cls, config: Fields) -> RopeConfig:
        """Read `rope_theta` + `rope_scaling`, or `rope_parameters` (transformers 5); ModelError names what is wrong."""
        rope = _rope_fields(config)
        kind = _kind(rope)
        if unknown := sorted(rope.values.keys() - _COMMON - _KEYS[kind]):
            raise ModelError(
                f"{rope.name}: {shown(unknown[0])} is not known for rope_type {kind!r}; "
                f"known are {', '.join(sorted(_COMMON | _KEYS[kind]))}"
            )
        if rope.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            rope.refuse("partial_rotary_factor", "be 1: partial rotation is not supported")
        theta = rope.number("rope_theta", 1.0 + 1e-6, 1e12, 10000.0)
        if kind == "default":
            return cls(theta=theta)
        if kind == "linear":
            return cls(kind, theta, factor=rope.number("factor", 1e-6, _MAX_FACTOR))
        length = config.integer("max_position_embeddings", 1, _MAX_LENGTH)
        original = rope.integer("original_max_position_embeddings", 1, _MAX_LENGTH, length)
        if kind == "llama3":
            low = rope.number("low_freq_factor", 1e-6, _MAX_FACTOR)
            high = rope.number("high_freq_factor", 1e-6, _MAX_FACTOR)
            if high <= low:
                rope.refuse("high_freq_factor", f"be above low_freq_factor ({low:g})")
            factor = rope.number("factor", 1e-6, _MAX_FACTOR)
            return cls(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
        return cls._yarn(rope, theta, length, original)

    @classmethod
    def _yarn(cls, rope: Fields, theta: float, length: int, original: int) -> RopeConfig:
        if "factor" not in rope.values:
            rope.refuse("factor", "be a number (null takes max_position_embeddings / original_max_position_embeddings)")
        factor = rope.number("factor", 1e-6, _MAX_FACTOR, length / original)
        mscale = rope.number("mscale", 0.0, _MAX_FACTOR, 0.0)
        mscale_all_dim = rope.number("mscale_all_dim", 0.0, _MAX_FACTOR, 0.0)
        if rope.given("attention_factor"):
            attention_factor = rope.number("attention_factor", 0.0, _MAX_FACTOR)
        elif mscale and mscale_all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
        else:
            attention_factor = _mscale(factor, 1.0)
        return cls(
            "yarn",
            theta,
            factor,
            original,
            attention_factor=attention_factor,
            # zero is taken as "not given", as transformers does
            beta_fast=rope.number("beta_fast", 0.0, _MAX_FACTOR, 32.0) or 32.0,
            beta_slow=rope.number("beta_slow", 0.0, _MAX_FACTOR, 1.0) or 1.0,
            truncate=rope.boolean("truncate", True),
        )

    def inverse_frequencies(self, head_dim: int) -> tuple[float, ...]:
        """Radians per position, [head_dim / 2], float64."""
        plain = [self.theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
        if self.kind == "linear":
            return tuple(f / self.factor for f in plain)
        if self.kind == "llama3":
            return tuple(self._llama3(f) for f in plain)
        if self.kind == "yarn":
            low, high = self._correction_range(head_dim)
            ramps = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(head_dim // 2)]
            return tuple(f * (1.0 - r) + f / self.factor * r for f, r in zip(plain, ramps, strict=True))
        return tuple(plain)

    def _llama3(self, frequency: float) -> float:
        """Long waves are stretched by the factor, short ones are left, those between are blended."""
        turns = self.original_max_position_embeddings * frequency / (2.0 * math.pi)
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1.0 - smooth) * frequency / self.factor + smooth * frequency

    def _correction_range(self, head_dim: int) -> tuple[float, float]:
        """Between which two dimensions yarn goes from unchanged to stretched."""

        def dimension(rotations: float) -> float:
            length = self.original_max_position_embeddings
            return head_dim * math.log(length / (rotations * 2.0 * math.pi)) / (2.0 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = float(math.floor(low)), float(math.ceil(high))
        low, high = max(low, 0.0), min(high, head_dim - 1.0)
        return low, high if low != high else high + 0.001


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _rope_fields(config: Fields) -> Fields:
    """The rope dictionary with the fields that stand beside it folded in. Two different values are refused."""
    spellings = [name for name in ("rope_scaling", "rope_parameters") if config.mapping(name)]
    if len(spellings) == 2 and config.values["rope_scaling"] != config.values["rope_parameters"]:
        config.refuse("rope_scaling", "equal rope_parameters where both are given; remove one of them")
    where = spellings[0] if spellings else "rope_parameters"
    values = dict(config.mapping(where))
    for key, value in values.items():
        if isinstance(value, dict):
            raise ModelError(
                f"{config.name}: {where}: {shown(key)} gives layers their own rope, which is not supported"
            )
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if not config.given(key):
            continue
        if values.get(key) is None:
            # every kind has a theta; the original length is read only by the kinds that have one
            if key != "original_max_position_embeddings" or key in _KEYS[_kind(Fields(values, config.name))]:
                values[key] = config.values[key]
        elif values[key] != config.values[key]:
            config.refuse(key, f"equal {where}.{key} ({shown(values[key])}) where both are given; remove one of them")
    return Fields(values, f"{config.name}: {where}")


def _kind(rope: Fields) -> str:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if rope.text("type", kind) != kind:
        rope.refuse("type", f"equal rope_type ({kind!r}) where both are given; remove one of them")
    if kind not in _KEYS:
        rope.refuse("rope_type" if rope.given("rope_type") else "type", f"be one of {', '.join(_KEYS)}")
    return kind
