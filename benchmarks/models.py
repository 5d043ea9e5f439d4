"""The models that the benchmarks run where none is given: known shapes, random weights, nothing downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# `small` is the shape of a common 135M model; the long cases need its positions.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 768,
        "vocab_size": 4096,
        "max_position_embeddings": 40960,
    },
    "small": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "mid": {
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 4864,
        "vocab_size": 32000,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}


@contextmanager
def model_folder(shape: str, cache: str | None = None) -> Iterator[Path]:
    """A bfloat16 Llama folder of a named shape, the same weights each time.

    Args:
        cache: folder to keep it in, and to take it from where it is there; None writes a temporary one.
    """
    if cache is None:
        with TemporaryDirectory(prefix="quire-benchmark-") as temporary:
            yield _write(shape, Path(temporary) / shape)
        return
    folder = Path(cache) / f"llama-{shape}-bfloat16"
    if not (folder / "config.json").exists():
        # written beside it and renamed: a run that was stopped leaves no half model under the name
        with TemporaryDirectory(prefix="quire-benchmark-", dir=_made(cache)) as temporary:
            _write(shape, Path(temporary) / shape).rename(folder)
    yield folder


def _made(folder: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _write(shape: str, folder: Path) -> Path:
    from transformers.utils import logging

    from tests.models import make_model

    untyped: Any = logging
    untyped.disable_progress_bar()
    return make_model(folder, "llama", seed=0, dtype="bfloat16", **SHAPES[shape])
