"""Reads a `--config` file: one flat YAML mapping from keys (`max-num-seqs` or `max_num_seqs`) to plain values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pagetable.errors import ConfigError

MAX_BYTES = 1 << 20
_PLAIN = "tag:yaml.org,2002:"


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known one, if any is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


def read_config_file(path: str, names: Iterable[str]) -> dict[str, Any]:
    """The file's values by field name, plain and not yet checked against their limits.

    Args:
        names: the known fields.

    Raises ConfigError for a file that cannot be read or is not one flat mapping, and for an unknown key, a key
    that stands twice (also once with - and once with _), and a value with a tag of its own such as `!!python/...`.
    """
    known = list(names)
    root = _compose(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("--config", path, "hold one mapping of keys to values", "write lines like `block-size: 16`")
    values: dict[str, Any] = {}
    for key_node, value_node in root.value:
        key, at = str(key_node.value), f"line {key_node.start_mark.line + 1} of {path}"
        name = key.replace("-", "_")
        if not isinstance(key_node, yaml.ScalarNode) or name not in known:
            raise ConfigError(
                key, at, "be a key of the configuration", nearest(name, known) or f"keys: {', '.join(known)}"
            )
        if name in values:
            raise ConfigError(key, at, "stand once in the file", "drop one of the two lines")
        if not value_node.tag.startswith(_PLAIN) or value_node.tag.startswith(_PLAIN + "python"):
            raise ConfigError(key, value_node.tag, "be a plain YAML value", "drop the tag; tags are never acted on")
        if not isinstance(value_node, yaml.ScalarNode):
            raise ConfigError(key, f"a {value_node.id} in {at}", "be a single plain value")
        try:
            values[name] = yaml.SafeLoader("").construct_object(value_node)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(key, value_node.value, f"be a plain YAML value ({at})") from error
    return values


def _compose(path: str) -> yaml.Node | None:
    """The file's syntax tree; no object of any tag has been made yet."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError("--config", path, f"be a file of at most {MAX_BYTES} bytes")
        return yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError("--config", path, "be a file that can be read", error.strerror or "") from error
    except UnicodeDecodeError as error:
        raise ConfigError("--config", path, "be UTF-8 text") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}: {getattr(error, 'problem', '')})" if mark else ""
        raise ConfigError("--config", path, f"be YAML{where}") from error
