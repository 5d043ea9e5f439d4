"""Typed, bounded reading of the JSON files of a model folder, which may come from anywhere.

Python's own reader takes duplicate keys (the last wins), NaN, Infinity and 1e999; two programs that read such a
file can see two models, so all of these are refused here. Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from pagetable.errors import ModelError, shown

_REQUIRED = object()


def parse_json(data: bytes, name: str) -> object:
    """The value that `data` says; ModelError names `name` where the text is not strict JSON."""

    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ModelError(f"{name}: the key {shown(twice)} stands twice in one object; keep one of them")
        return found

    def no_constant(text: str) -> NoReturn:
        raise ModelError(f"{name}: holds {text}, which is not JSON; write a finite number")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ModelError(f"{name}: holds the number {shown(text)}, which no float64 can hold")
        return value

    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=finite)
    except UnicodeDecodeError:
        raise ModelError(f"{name}: is not UTF-8 text") from None
    except RecursionError:
        raise ModelError(f"{name}: is nested too deeply to be read") from None
    except ValueError as error:
        # a JSONDecodeError says line and column; other ValueErrors come from integers of thousands of digits
        raise ModelError(f"{name}: is not valid JSON ({error})") from None


def read_object(path: Path, limit: int) -> dict[str, object]:
    """The JSON object in the file `path`; ModelError where it is missing, above `limit` bytes or no object."""
    name = path.name
    if not path.is_file():
        raise ModelError(f"{name}: there is no such file in the model folder; is this a Hugging Face model folder?")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelError(f"{name}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise ModelError(f"{name}: has more than {limit} bytes, the most that is read")
    value = parse_json(data, name)
    if not isinstance(value, dict):
        raise ModelError(f"{name}: holds {shown(value)}, must hold one JSON object")
    return value


class Fields:
    """One JSON object read field by field. Every wrong field is a ModelError that names it.

    A field that is missing or null gives the default; without a default it is an error.
    """

    def __init__(self, values: Mapping[str, object], name: str) -> None:
        self.values, self.name = values, name

    def refuse(self, field: str, limit: str) -> NoReturn:
        """ModelError: `field` has a value that it may not; `limit` is the end of "must ..."."""
        if field not in self.values:
            raise ModelError(f"{self.name}: {field} is missing, must {limit}")
        raise ModelError(f"{self.name}: {field}: got {shown(self.values[field])}, must {limit}")

    def given(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def integer(self, field: str, low: int, high: int, default: object = _REQUIRED) -> int:
        value = self._value(field, default)
        if type(value) is not int or not low <= value <= high:
            self.refuse(field, f"be an integer from {low} to {high}")
        return value

    def number(self, field: str, low: float, high: float, default: object = _REQUIRED) -> float:
        """A finite number in [low, high]."""
        value = self._value(field, default)
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            self.refuse(field, f"be a number from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    def boolean(self, field: str, default: object = _REQUIRED) -> bool:
        value = self._value(field, default)
        if type(value) is not bool:
            self.refuse(field, "be true or false")
        return value

    def text(self, field: str, default: object = _REQUIRED) -> str:
        value = self._value(field, default)
        if type(value) is not str:
            self.refuse(field, "be a string")
        return value

    def strings(self, field: str) -> tuple[str, ...]:
        """A list of strings; empty where missing or null."""
        value = self.values.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or any(type(item) is not str for item in value):
            self.refuse(field, "be a list of strings")
        return tuple(value)

    def mapping(self, field: str) -> dict[str, object]:
        """An object; empty where missing or null."""
        value = self.values.get(field)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(field, "be an object")
        return value

    def _value(self, field: str, default: object) -> object:
        value = self.values.get(field)
        if value is None and default is not _REQUIRED:
            return default
        return value
