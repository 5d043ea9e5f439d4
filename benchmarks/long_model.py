"""The model of the long context: small enough that a million tokens of it fit into a machine without a GPU.

Random weights with a seed, written without transformers, so that the memory of the process that measures is the
engine's own. Queries and keys are sharp enough that a row still hangs on single pages among a million tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 2, 256, 8, 1, 32, 512, 4096
MAX_LENGTH = (1 << 20) + 4096
_SHARPNESS = 1.7  # of queries and of keys: scores have its square as standard deviation
_WRITE = 0.7  # of what a layer adds to a row of size 1


def write_long_model(folder: Path, seed: int = 0) -> Path:
    """Fill `folder`, made if absent, with config.json and bfloat16 weights; the same for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_weights(seed), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def _weights(seed: int) -> dict[str, torch.Tensor]:
    """Matrices of variance 1 / inputs, so that activations keep their size."""
    rng = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        drawn = rng.standard_normal((outputs, inputs)) * (gain / inputs**0.5)
        return torch.from_numpy(drawn).to(torch.bfloat16)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    found = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, HIDDEN**0.5)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {
            at + "input_layernorm.weight": ones.clone(),
            at + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN, _SHARPNESS),
            at + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN, _SHARPNESS),
            at + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM, _WRITE),
            at + "post_attention_layernorm.weight": ones.clone(),
            at + "mlp.gate_proj.weight": matrix(MLP, HIDDEN),
            at + "mlp.up_proj.weight": matrix(MLP, HIDDEN),
            at + "mlp.down_proj.weight": matrix(HIDDEN, MLP, _WRITE),
        }
    return found | {"model.norm.weight": ones.clone(), "lm_head.weight": matrix(VOCAB, HIDDEN, 2.5)}
