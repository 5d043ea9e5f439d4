"""Reads and writes the table of one hardware's constants: a flat YAML mapping with the fields of `Hardware`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.config_file import MAX_BYTES, nearest
from pagetable.errors import ConfigError
from pagetable.hardware import Hardware

FOLDER = Path(__file__).parent / "hardware"
_FLAG = "--hardware"
_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Hardware) if field.name != "threads"}
_RATES = "product_flops"  # the one field that is a mapping: rows -> rate


def known_hardware() -> list[str]:
    """The names of the tables that come with Quire."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_hardware(name: str) -> Hardware:
    """The table of that name, or the file of that path.

    Errors: ConfigError for a file that cannot be read, an unknown, missing or repeated key, and a value of another type
    or outside its bounds; it names the key.
    """
    path = FOLDER / f"{name}.yaml" if name in known_hardware() else Path(name)
    root = _compose(path, name)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(_FLAG, name, "hold one mapping of keys to values", "`quire plan --measure` writes one")
    values: dict[str, Any] = {}
    for key_node, value_node in root.value:
        key = str(key_node.value)
        if not isinstance(key_node, yaml.ScalarNode) or key not in _KINDS:
            at = f"line {key_node.start_mark.line + 1} of {name}"
            raise ConfigError(key, at, "be a key of a hardware table", nearest(key, _KINDS) or f"keys: {_listed()}")
        if key in values:
            raise ConfigError(key, f"twice in {name}", "stand once in the file", "drop one of the two lines")
        values[key] = _rates(value_node) if key == _RATES else _plain(key, value_node, _KINDS[key])
    missing = [key for key in _KINDS if key not in values]
    if missing:
        raise ConfigError(missing[0], None, f"stand in {name}", "a table names every constant")
    return Hardware(**values)


def to_yaml(hardware: Hardware, comments: Mapping[str, str]) -> str:
    """The text that `read_hardware` reads back; a comment stands behind its key's value."""
    lines = []
    for key in _KINDS:
        value, comment = getattr(hardware, key), f"  # {comments[key]}" if key in comments else ""
        if key == _RATES:
            lines.append(f"{key}:{comment}")
            lines += [f"  {rows}: {_shown(rate)}" for rows, rate in value]
        else:
            lines.append(f"{key}: {_shown(value)}{comment}")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> object:
    """Three digits are more than a measurement repeats; YAML 1.1 takes a float's exponent only with dot and sign."""
    return f"{value:.2e}" if isinstance(value, float) else value


def _rates(node: yaml.Node) -> tuple[tuple[int, float], ...]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(_RATES, node.value, "be a mapping of rows to rates", "write lines like `1: 7.0e+10` under it")
    found = [(_plain(_RATES, rows, "int"), _plain(_RATES, rate, "float")) for rows, rate in node.value]
    return tuple(found)


def _plain(key: str, node: yaml.Node, kind: str) -> Any:
    """The value of a scalar of that type; a whole number is a float too."""
    cure = "write a float as 4.3e+12, with dot and sign" if kind == "float" else ""
    limit = {"int": "be a whole number", "float": "be a number", "str": "be a word"}[kind]
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(key, node.tag.rpartition(":")[2], limit, cure)
    if node.tag.rpartition(":")[2] not in {"float": ("float", "int")}.get(kind, (kind,)):
        raise ConfigError(key, node.value, limit, cure)
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(key, node.value, limit, cure) from error
    return float(value) if kind == "float" else value


def _compose(path: Path, name: str) -> yaml.Node | None:
    """The file's syntax tree; no object of any tag has been made yet."""
    cure = f"give one of {', '.join(known_hardware())}, or a file that `quire plan --measure` wrote"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(_FLAG, name, f"be a file of at most {MAX_BYTES} bytes")
        return yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(_FLAG, name, "be UTF-8 text") from error
        raise ConfigError(_FLAG, name, "be a known hardware or a file that can be read", cure) from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}: {getattr(error, 'problem', '')})" if mark else ""
        raise ConfigError(_FLAG, name, f"be YAML{where}") from error


def _listed() -> str:
    return ", ".join(_KINDS)
