"""A Llama folder as GGUF, bfloat16 or float32, without a vocabulary: requests are token ids.

python prepare_llamacpp.py MODEL TARGET
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
FLAT = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def target_name(name: str) -> str:
    if name in FLAT:
        return FLAT[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head's rows in ggml's order: it rotates neighbours, Hugging Face dimension j with j + d/2."""
    dim = weight.shape[0] // heads
    order = torch.arange(dim).view(2, dim // 2).t().reshape(-1)
    return weight.view(heads, dim, -1)[:, order].reshape(weight.shape)


model, target = map(Path, sys.argv[1:])
config = json.loads((model / "config.json").read_text())
if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
    raise SystemExit("only plain Llama models are converted")
rope = config.get("rope_parameters") or {}
if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
    raise SystemExit("only the default rope is converted")
target.mkdir(parents=True, exist_ok=True)
writer = gguf.GGUFWriter(target / "model.gguf", "llama")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta")))
writer.add_rope_dimension_count(config["head_dim"])
writer.add_vocab_size(config["vocab_size"])
writer.add_tokenizer_model("no_vocab")
with safe_open(model / "model.safetensors", "pt") as file:
    for name in file.keys():  # noqa: SIM118  # it is no dict
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        tensor = file.get_tensor(name)
        if name.endswith("q_proj.weight"):
            tensor = neighbours(tensor, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            tensor = neighbours(tensor, config["num_key_value_heads"])
        if tensor.ndim == 1 or tensor.dtype == torch.float32:
            writer.add_tensor(target_name(name), tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.int16).numpy().view(np.uint8)
            raw = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] * 2)
            writer.add_tensor(target_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
