"""Writes a tiny Llama folder with random weights, in the files that a real one has.

    python -m launch.models.tiny_llama FOLDER [SEED]

Needs no transformers and no network: config.json, model.safetensors, tokenizer.json (byte-level BPE, trained on the
text below) and tokenizer_config.json with a chat template. The same seed writes the same weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_VOCAB = 512
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 128, 4, 8, 2, 16, 352

_TEXT = """\
A quire is a gathering of pages. A book is made of quires, and each quire is folded, sewn and bound with the others.
Once upon a time there was a small library at the end of a long road. Its keeper read one page of every book each day.
When a guest came in from the rain, the keeper asked what they wanted to read, and they often read the same page.
Why copy a page that two people read? They can sit side by side, look at the same page, and turn to their own later.
The memory of a machine is a shelf of blocks. A block holds a page, a page holds some tokens, and a table says where.
You are a helpful assistant. Answer in one short sentence. What is a page? How many pages does a book have? Tell me why.
"""


def make_tiny_llama(folder: Path, seed: int = 0) -> None:
    """Fill `folder` (made if absent) with a model of about a million random parameters in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    end, turn_end = tokenizer.token_to_id(END), tokenizer.token_to_id(TURN_END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": end,
        "eos_token_id": [end, turn_end],
        "torch_dtype": "float32",
    }
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": [end, turn_end]})
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    _write(folder / "tokenizer_config.json", names | {"chat_template": CHAT_TEMPLATE, "model_max_length": 4096})
    save_file(_weights(seed, vocab), str(folder / "model.safetensors"), metadata={"format": "pt"})


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END, TURN, TURN_END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    return tokenizer


def _weights(seed: int, vocab: int) -> dict[str, np.ndarray]:
    """Matrices of variance 1 / inputs, so that activations keep their size; sharper queries make tokens differ."""
    rng = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((outputs, inputs)) * gain / inputs**0.5).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(vocab, HIDDEN, HIDDEN**0.5)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {
            at + "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            at + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN, 1.7),
            at + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN, 1.7),
            at + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            at + "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            at + "mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            at + "mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            at + "mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE, 2.0),
        }
    found["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    found["lm_head.weight"] = matrix(vocab, HIDDEN, 2.5)
    return found


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_tiny_llama(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
