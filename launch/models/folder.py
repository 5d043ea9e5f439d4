"""Writes a Hugging Face model folder, the same bytes for the same content, with whichever version of the libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

Weights = Mapping[str, torch.Tensor]


def write_folder(
    folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any], chat: Mapping[str, Any], weights: Weights
) -> None:
    """Fill `folder`, made if absent.

    Args:
        config: config.json.
        tokenizer: tokenizer.json, as JSON and not through the tokenizers library, whose file changes by version.
        chat: tokenizer_config.json.
        weights: model.safetensors, in the dtype they have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", chat)):
        text = json.dumps(content, indent=None if name == "tokenizer" else 2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save(dict(weights), metadata={"format": "pt"}))


def word_tokenizer(words: list[str], specials: list[str], normalizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """tokenizer.json of whole words and single marks; an id is a place in `words`.

    Args:
        specials: words of `words` that text cannot spell and decoding leaves out. The first stands for unknown words,
            the second begins every text.
    """
    ids = {word: index for index, word in enumerate(words)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin: dict[str, Any] = {"SpecialToken": {"id": specials[1], "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[word], "content": word, **flags} for word in specials],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {specials[1]: {"id": specials[1], "ids": [ids[specials[1]]], "tokens": [specials[1]]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": specials[0]},
    }
