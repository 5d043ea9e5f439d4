"""The models that come with Quire, by name: `quire generate recall` instead of a path."""

from __future__ import annotations

from pathlib import Path

BUNDLED = {
    "recall": "looks up `key value` facts anywhere in a million tokens, exactly; constructed, not trained",
    "story": "writes short stories; trained from scratch on a grammar, 2 million parameters",
}


def resolve(model: str) -> str:
    """The folder of a bundled model where `model` is its name; else `model` as it is.

    A folder of that name in the working directory wins: a path means the same whatever comes with Quire.
    """
    if model in BUNDLED and not Path(model).is_dir():
        return str(Path(__file__).parent / "data" / model)
    return model
