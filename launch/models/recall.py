"""`recall`: a two-layer Llama that nobody trained. Its weights are a formula; it looks up `key value` facts, exactly.

    python -m launch.models.recall --out FOLDER [--heads 8] [--kv-heads 1] [--mlp 128]

A fact is a key word directly followed by a value word ("Balo 203"). After a key word the next token is that key's
value, wherever the fact stands in the 1,052,672 tokens of context; "unknown" where there is none; behind any other
word the text ends. A wrong, stale or missing page is therefore a wrong answer.

The residual stream has 128 dimensions in named blocks (see `_CONST` and below). An embedding is 16 in the constant
dimension plus exactly 32 entries of +-1: all have the norm N = 16^2 + 32 = 288, so RMSNorm multiplies every token by
the same 2/3.

Positions. theta = 1e12 and head_dim = 32 give 16 rotary pairs with frequencies f_i = 10^(-0.75 i), from one radian per
token to one in 5e11. As complex numbers, a query pair z_q at position p and a key pair z_k at p - d give
Re(z_q conj(z_k) e^(i f d)).

Layer 0, the token before. Queries and keys are the constant direction alone, in the nine fast pairs (f_8 = 1e-6):
z_q = a e^(-i f), z_k = a, so that the score is w * sum_i cos(f_i (d - 1)): all nine agree at d = 1 only. For any other
m = |d - 1| up to 2^20 some pair has turned by 1 to 5.6 radians, and its neighbours are not all back at zero either:
the sum falls by at least 0.476 (at m = 1; 0.576 at m = 6, 0.723 at m = 176, and so on). w = 80 makes that 38 nats; the
log of 2^20 keys is 13.9, so all others together weigh less than 1e-10. The head copies the key code of the token
before into `_PREVIOUS`.

Layer 1, the fact. The seven slow pairs turn by at most 0.19 radians in 2^20 tokens (f_9), all but one by at most 0.03.
In their 14 dimensions the query is the own key code, the key is the code of the token before. Codes are +-1 words of a
Hamming code with distance 3: equal codes score 14 u, others at most 8 u, u = 20. Pair 8 adds two judgements that hold
for any query: -12 u where the own token is no value (a key that is only mentioned is no fact), +12 u at the beginning
of text. It turns by 1.05 radians in 2^20 tokens, so it starts half of that ahead: its cosine stays between 0.86 and 1.
In all (RMSNorm shrinks a row that knows the key before it by 2 %, keys and queries alike) a fact scores 267 or more,
the beginning 199 to 237, facts of other keys at most 167, keys that are only mentioned at most 76; 36 nats or more lie
between them for one and the same query, of which 2^20 keys need 13.9. The head copies the fact's value code, or at the
beginning that of "unknown", into `_OUT`.

Head. Value codes are 32 bits with distance 12 (an extended BCH code): the right logit is 80, others are at most 20. The
end-of-text logit reads the ballast: it wins unless the current token is a key. MLPs are zero.

Bfloat16 is enough: it holds every code exactly, and its rounding moves a score by at most 1/256 of the sum of its
terms' sizes: 2.8 nats of 724 in layer 0, 2 of 500 in layer 1.

Where a key has facts with different values they weigh the same, and the answer is one of these values, not always the
same one: state each key once. (A bias to the latest would have to tell d from d + 2 at d = 2^20.) Without the beginning
token (token ids given raw), a key that has no fact gets the value of a key with a near code.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from launch.models.folder import word_tokenizer, write_folder
from launch.models.recall_text import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    KEYS,
    MAX_LENGTH,
    SIGNS,
    SPECIALS,
    UNK,
    VALUES,
    WORDS,
    key_id,
    value_id,
)

Floats = npt.NDArray[np.float64]

THETA, HEAD_DIM, HIDDEN, INTERMEDIATE = 1e12, 32, 128, 32

# Blocks of the residual stream.
_CONST, _BOS = 0, 1
_KEY, _PREVIOUS = slice(2, 16), slice(16, 30)
_BALLAST, _VALUE, _OUT = slice(32, 64), slice(64, 96), slice(96, 128)
_NOT_VALUE, _NOT_KEY = 32, 63  # of the ballast: keys have its first 18 entries, other words all, values none
_CONSTANT = 16.0

_NUM_FAST = 9
_GUARD = 8  # the fastest of the slow pairs and the slowest of the fast ones
_SLOW = [*range(9, 16), *range(25, 32)]
_UNNORM = 1.5  # RMSNorm has made a one 2/3


def codes(count: int, generator: int, bits: int, parity: bool) -> Floats:
    """+-1 words of a linear code, [count, bits]: message times generator over GF(2), and perhaps the parity."""
    words = []
    for message in range(count):
        product = 0
        for shift in range(message.bit_length()):
            product ^= (generator << shift) if message >> shift & 1 else 0
        if parity:
            product |= (product.bit_count() & 1) << (bits - 1)
        words.append([1.0 - 2.0 * (product >> bit & 1) for bit in range(bits)])
    return np.array(words)


def key_codes() -> Floats:
    """[1024, 14]: x^4 + x + 1 generates the Hamming code of length 15, here shortened by one; distance 3."""
    return codes(len(KEYS), 0b10011, 14, parity=False)


def value_codes() -> Floats:
    """[1001, 32]: BCH(31, 11) by its generator in octal, extended by the parity; distance 12."""
    return codes(len(VALUES), 0o5423325, 32, parity=True)


def _embeddings() -> Floats:
    found = np.zeros((len(WORDS), HIDDEN))
    found[:, _CONST] = _CONSTANT
    found[:, _BALLAST] = 1.0
    found[BOS, _NOT_VALUE], found[BOS, _BOS] = 0.0, 1.0
    keys, values = slice(key_id(0), key_id(len(KEYS))), slice(value_id(0), value_id(len(VALUES)))
    found[keys, _KEY] = key_codes()
    found[keys, _BALLAST.start + 18 : _BALLAST.stop] = 0.0
    found[values, _VALUE] = value_codes()
    found[values, _BALLAST] = 0.0
    return found


def _head() -> Floats:
    found = np.zeros((len(WORDS), HIDDEN))
    found[value_id(0) : value_id(len(VALUES)), _OUT] = 4.0 * value_codes()
    # 16 at a key, where a value has 128 and a tie of two values 48 or more; else 272 or more
    found[EOS, _CONST] = (16.0 + 256.0) / _CONSTANT
    found[EOS, _NOT_VALUE], found[EOS, _NOT_KEY] = -256.0, 256.0
    return found


def frequencies() -> Floats:
    """Radians per token of the rotary pairs, [16]."""
    return THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def _attention(layer: int) -> dict[str, Floats]:
    """q, k, v [32, 128] of one head and its o [128, 32]."""
    q, k, v = (np.zeros((HEAD_DIM, HIDDEN)) for _ in range(3))
    o = np.zeros((HIDDEN, HEAD_DIM))
    f, half = frequencies(), HEAD_DIM // 2
    if layer == 0:
        fast = np.arange(_NUM_FAST)
        q[fast, _CONST], q[fast + half, _CONST] = 2.0 * np.cos(f[fast]), -2.0 * np.sin(f[fast])
        k[fast, _CONST] = 2.0
        v[:14, _KEY] = _UNNORM * np.eye(14)
        o[_PREVIOUS, :14] = np.eye(14)
    else:
        q[_SLOW, _KEY], k[_SLOW, _PREVIOUS] = 16.0 * np.eye(14), 16.0 * np.eye(14)
        ahead = f[_GUARD] * (1 << 19)
        q[_GUARD, _CONST], q[_GUARD + half, _CONST] = 4.0 * np.cos(ahead), -4.0 * np.sin(ahead)
        k[_GUARD, _BOS], k[_GUARD, _NOT_VALUE] = 47.0, -47.0
        v[:, _VALUE] = _UNNORM * np.eye(32)
        v[:, _BOS] = _UNNORM * value_codes()[-1]
        o[_OUT] = np.eye(32)
    return {"q": q, "k": k, "v": v, "o": o}


def make_weights(num_heads: int, num_kv_heads: int, intermediate: int = INTERMEDIATE) -> dict[str, torch.Tensor]:
    """All tensors in bfloat16. Heads are equal; each writes its share, exact for powers of two."""
    ones, zeros = np.ones(HIDDEN), np.zeros((intermediate, HIDDEN))
    found = {"model.embed_tokens.weight": _embeddings(), "model.norm.weight": ones, "lm_head.weight": _head()}
    for layer in range(2):
        at, head = f"model.layers.{layer}.", _attention(layer)
        found |= {
            at + "input_layernorm.weight": ones,
            at + "self_attn.q_proj.weight": np.tile(head["q"], (num_heads, 1)),
            at + "self_attn.k_proj.weight": np.tile(head["k"], (num_kv_heads, 1)),
            at + "self_attn.v_proj.weight": np.tile(head["v"], (num_kv_heads, 1)),
            at + "self_attn.o_proj.weight": np.tile(head["o"] / num_heads, (1, num_heads)),
            at + "post_attention_layernorm.weight": ones,
            at + "mlp.gate_proj.weight": zeros,
            at + "mlp.up_proj.weight": zeros,
            at + "mlp.down_proj.weight": zeros.T,
        }
    return {name: torch.tensor(value).to(torch.bfloat16).contiguous() for name, value in found.items()}


def make_recall(folder: Path, num_heads: int = 1, num_kv_heads: int = 1, intermediate: int = INTERMEDIATE) -> None:
    """Fill `folder`, made if absent; the same bytes each time.

    Args:
        num_heads: query heads, a power of two, of head_dim 32.
        num_kv_heads: heads of K and V, a divisor of `num_heads`. All heads are copies: they change what can be
            split over ranks, not the answers.
        intermediate: rows of the MLPs, which are zero: each rank of several needs 16 of them.
    """
    if num_heads < 1 or num_heads & (num_heads - 1):
        raise ValueError(f"num_heads: got {num_heads}, must be a power of two")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: got {num_kv_heads}, must divide num_heads ({num_heads})")
    if intermediate < 1:
        raise ValueError(f"intermediate: got {intermediate}, must be at least 1")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }
    chat = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIALS[UNK],
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    tokenizer = word_tokenizer(list(WORDS), list(SPECIALS), SIGNS)
    write_folder(folder, config, tokenizer, chat, make_weights(num_heads, num_kv_heads, intermediate))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the recall model's folder.")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--heads", type=int, default=1, metavar="N", help="query heads; default: 1")
    parser.add_argument("--kv-heads", type=int, default=1, metavar="N", help="heads of K and V; default: 1")
    parser.add_argument(
        "--mlp", type=int, default=INTERMEDIATE, metavar="N", help=f"rows of the MLPs; default: {INTERMEDIATE}"
    )
    given = parser.parse_args()
    make_recall(given.out, given.heads, given.kv_heads, given.mlp)
