"""Small random Hugging Face model folders with seeds, over every option that the engine reads.

Weights are drawn so that activations stay O(1) and logits have a standard deviation near 2.5: a top token exists, and
greedy decoding does not fall into one token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 331,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Sharper attention and a weaker attention write than MLP write: without it a random model gives every position the
# same direction, and decoding repeats one token.
_GAIN = {"q_proj": 1.7, "k_proj": 1.7, "o_proj": 0.7, "down_proj": 3.0}
# A tied model in which the MLPs do not drown the token's own embedding repeats that token for ever. (A smaller
# embedding does the same, but makes the logits so sensitive that transformers' float32 rotary angles, wrong by 3e-5
# rad at position 700, move them by 4e-4.)
_TIED_GAIN = 12.0

# Lengths from which llama3 and yarn start are short, so that prompts of a few hundred tokens run far behind them.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_YARN_ALL = _YARN | {
    "factor": 8.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "truncate": False,
}


def _heads(num_heads: int, num_kv_heads: int, head_dim: int, hidden_size: int) -> dict[str, int]:
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden_size,
    }


_LINEAR = {"rope_type": "linear", "factor": 4.0}
_TIED, _LEGACY = {"tie_word_embeddings": True}, {"legacy": True}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_LAYERS = {"num_hidden_layers": 3}
_MIXED = _LAYERS | {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}
_TYPED = _LAYERS | {
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 17,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": parameters}


# (name, arch, overrides); `legacy` is make_model's own: config.json in the spelling of transformers 4.
TWELVE: list[tuple[str, str, dict[str, Any]]] = [
    ("llama-plain", "llama", {}),
    ("llama-3-1-tied", "llama", _heads(3, 1, 32, 96) | _TIED),
    ("llama-7-1-linear", "llama", _heads(7, 1, 32, 112) | _rope(_LINEAR)),
    ("llama-9-3-legacy", "llama", _heads(9, 3, 64, 144) | _LAYERS | _LEGACY),
    ("llama-80-linear-legacy", "llama", _heads(2, 2, 80, 64) | _rope(_LINEAR) | _LEGACY),
    ("llama-14-2-llama3-tied", "llama", _heads(14, 2, 32, 112) | _rope(_LLAMA3) | _TIED),
    ("llama-llama3-legacy", "llama", _heads(2, 1, 64, 64) | _rope(_LLAMA3) | _LEGACY),
    ("llama-96-yarn", "llama", _heads(3, 1, 96, 96) | _rope(_YARN)),
    ("llama-biases-yarn-all-legacy", "llama", _heads(3, 3, 32, 96) | _BIASES | _rope(_YARN_ALL) | _LEGACY),
    ("mistral-window", "mistral", _heads(4, 2, 64, 64) | {"sliding_window": 24}),
    ("mistral-128-legacy", "mistral", _heads(3, 1, 128, 96) | {"sliding_window": None} | _LEGACY),
    ("qwen2-14-2-tied", "qwen2", _heads(14, 2, 32, 112) | _TIED),
    ("qwen2-mixed-window", "qwen2", _heads(6, 2, 32, 96) | _MIXED),
    ("qwen2-yarn-legacy", "qwen2", _heads(2, 2, 32, 64) | _rope(_YARN | {"attention_factor": 1.2}) | _LEGACY),
    ("qwen3-128-tied", "qwen3", _heads(3, 1, 128, 96) | _TIED),
    ("qwen3-layer-types", "qwen3", _heads(6, 2, 32, 96) | _TYPED),
]


def make_model(
    folder: str | Path,
    arch: str = "llama",
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str | int = "5GB",
    legacy: bool = False,
    **overrides: Any,
) -> Path:
    """Write a model folder by transformers' save_pretrained (safetensors; no tokenizer) and return its path.

    Args:
        arch: llama, mistral, qwen2 or qwen3.
        max_shard_size: transformers' own; "100KB" makes several files and an index.
        legacy: rewrite config.json to `rope_theta`, `rope_scaling` and `torch_dtype`, as transformers 4 wrote it.
        overrides: fields of the configuration class, over `SMALL`.
    """
    folder = Path(folder)
    config = getattr(transformers, f"{_CLASSES[arch]}Config")(**{**SMALL, **overrides})
    model = getattr(transformers, f"{_CLASSES[arch]}ForCausalLM")(config).float().eval()
    _draw(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if legacy:
        _to_legacy(folder / "config.json")
    return folder


def reference(folder: str | Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """transformers' own model of a folder, with its plainest attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def _draw(model: transformers.PreTrainedModel, seed: int) -> None:
    config, generator = model.config, torch.Generator().manual_seed(seed)
    # the final norm gives unit rows, so that logits have this standard deviation with a head drawn N(0, 1)
    spread = 2.5 / math.sqrt(config.hidden_size)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        kind = name.split(".")[-2]
        if name == "model.norm.weight":
            parameter.copy_((1.0 + 0.1 * noise) * (spread if config.tie_word_embeddings else 1.0))
        elif name.endswith("norm.weight"):
            # q and k that are normalised again lose the gain of their projections
            parameter.copy_(_GAIN.get(kind.replace("norm", "proj"), 1.0) + 0.1 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise)
        elif kind == "lm_head":
            parameter.copy_(noise * spread)
        elif kind == "embed_tokens":
            parameter.copy_(noise)
        else:
            scale = _GAIN.get(kind, 1.0) / math.sqrt(parameter.shape[1])
            if kind in ("o_proj", "down_proj"):
                scale /= math.sqrt(2 * config.num_hidden_layers)
            if kind == "down_proj" and config.tie_word_embeddings:
                scale *= _TIED_GAIN
            parameter.copy_(noise * scale)


def _to_legacy(path: Path) -> None:
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    values["torch_dtype"] = values.pop("dtype")
    path.write_text(json.dumps(values, indent=2))
