"""`story`: a small Llama trained from scratch on the stories of `story_grammar`, in minutes on two cores.

    python -m launch.models.story --out FOLDER [--seed 1] [--steps 1600]

Prints the loss on held-out stories beside the grammar's own entropy, which no model can be below. The same seed on the
same machine with the same number of threads gives the same weights; elsewhere sums may round differently.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from launch.machine import sleep_while_waiting

if __name__ == "__main__":
    sleep_while_waiting()  # OpenMP reads it when torch is imported

import torch
import torch.nn.functional as F

from launch.models.folder import word_tokenizer, write_folder
from launch.models.story_grammar import sample, words

SPECIALS = ("<unk>", "<s>", "</s>")
WORDS = (*SPECIALS, *(word for word in words() if word not in SPECIALS))
UNK, BOS, EOS = range(3)
CONTEXT = 1024
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4, 160, 5, 5, 32, 448
THETA, EPS = 10000.0, 1e-5
TOKENS_PER_STEP, POOL = 3072, 512  # stories of like lengths go together, from a pool of so many
LEARNING_RATE, WARMUP, CLIP = 4e-3, 60, 1.0
HELD_OUT_SEED = 1_000_003
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
)
_IDS = {word: index for index, word in enumerate(WORDS)}

Parameters = dict[str, torch.Tensor]


def encode(story: list[str]) -> list[int]:
    """Token ids of the grammar's words, behind the beginning token."""
    return [BOS, *(_IDS[word] for word in story)]


def batches(seed: int) -> Iterator[torch.Tensor]:
    """Training rows without end, int64 [stories, longest], filled up with end tokens."""
    rng = Random(seed)
    while True:
        pool = sorted((encode(sample(rng)[0]) for _ in range(POOL)), key=len)
        rows: list[list[list[int]]] = [[]]
        for story in pool:
            if rows[-1] and (len(rows[-1]) + 1) * len(story) > TOKENS_PER_STEP:
                rows.append([])
            rows[-1].append(story)
        rng.shuffle(rows)
        for row in rows:
            longest = max(map(len, row))
            yield torch.tensor([story + [EOS] * (longest - len(story)) for story in row])


def initial(seed: int) -> Parameters:
    """Weights before training, float32, by the names of the model folder."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator) * gain / math.sqrt(inputs)

    deep = 1.0 / math.sqrt(2 * LAYERS)
    found = {"model.embed_tokens.weight": matrix(len(WORDS), HIDDEN, 0.3 * math.sqrt(HIDDEN))}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {
            at + "input_layernorm.weight": torch.ones(HIDDEN),
            at + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM, deep),
            at + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            at + "mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            at + "mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            at + "mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE, deep),
        }
    found["model.norm.weight"] = torch.ones(HIDDEN)
    found["lm_head.weight"] = matrix(len(WORDS), HIDDEN, 0.3)
    return found


def logits(p: Parameters, tokens: torch.Tensor) -> torch.Tensor:
    """[rows, tokens, words] of token ids [rows, tokens], position 0 first."""
    frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(tokens.shape[1])[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x.float(), (HIDDEN,), p[f"{name}.weight"], EPS)

    def heads(x: torch.Tensor, name: str, count: int) -> torch.Tensor:
        return F.linear(x, p[f"{name}.weight"]).unflatten(-1, (count, HEAD_DIM)).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    hidden = F.embedding(tokens, p["model.embed_tokens.weight"])
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        x = norm(hidden, at + "input_layernorm")
        q, k = rotate(heads(x, at + "self_attn.q_proj", HEADS)), rotate(heads(x, at + "self_attn.k_proj", KV_HEADS))
        v = heads(x, at + "self_attn.v_proj", KV_HEADS)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=HEADS != KV_HEADS)
        hidden = hidden + F.linear(seen.transpose(1, 2).flatten(2), p[at + "self_attn.o_proj.weight"])
        x = norm(hidden, at + "post_attention_layernorm")
        gate, up = F.linear(x, p[at + "mlp.gate_proj.weight"]), F.linear(x, p[at + "mlp.up_proj.weight"])
        hidden = hidden + F.linear(F.silu(gate) * up, p[at + "mlp.down_proj.weight"])
    return F.linear(norm(hidden, "model.norm"), p["lm_head.weight"])


def loss(p: Parameters, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum over the stories' tokens of -log p, in nats, and their number; the filling behind a story's end is not."""
    target = rows[:, 1:].clone()
    target[(target == EOS).cumsum(1) > 1] = -100
    flat = logits(p, rows[:, :-1]).float().flatten(0, 1)
    return F.cross_entropy(flat, target.flatten(), ignore_index=-100, reduction="sum"), int((target >= 0).sum())


def train(seed: int, steps: int) -> Parameters:
    """Weights in bfloat16; prints as it goes."""
    p = {name: tensor.requires_grad_() for name, tensor in initial(seed).items()}
    matrices = [t for name, t in p.items() if t.ndim == 2 and "embed" not in name and "head" not in name]
    rest = [t for t in p.values() if not any(t is m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.97))
    began, seen, average = time.perf_counter(), 0, 0.0
    for step, rows in zip(range(steps), batches(seed), strict=False):
        share = min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, count = loss(p, rows)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(list(p.values()), CLIP)
        optimizer.step()
        seen, average = seen + count, 0.98 * average + 0.02 * float(total.detach()) / count
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - began
            mean = average / (1 - 0.98 ** (step + 1))
            print(f"step {step + 1}: loss {mean:.4f}, {seen} tokens, {seconds:.0f} s", flush=True)
    return {name: tensor.detach().to(torch.bfloat16) for name, tensor in p.items()}


def held_out(p: Parameters, count: int = 400) -> tuple[float, float]:
    """Nats per token on `count` stories that training never drew: the model's loss, and the grammar's entropy."""
    rng = Random(HELD_OUT_SEED)
    wide = {name: tensor.float() for name, tensor in p.items()}
    total = entropy = 0.0
    tokens = 0
    with torch.inference_mode():
        for _ in range(count):
            story, log_probability = sample(rng)
            part, number = loss(wide, torch.tensor([encode(story)]))
            total, entropy, tokens = total + float(part), entropy - log_probability, tokens + number
    return total / tokens, entropy / tokens


def tokenizer() -> dict[str, Any]:
    """tokenizer.json: a word carries the space before it, marks stand alone."""
    shown = [word if word in (*SPECIALS, ".", ",") else f"\u2581{word}" for word in WORDS]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    marks = {"type": "Punctuation", "behavior": "Isolated"}
    found = word_tokenizer(shown, list(SPECIALS), None)
    return found | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [space, marks]}, "decoder": space}


def write(folder: Path, p: Parameters) -> None:
    """The model folder."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPS,
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
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    write_folder(folder, config, tokenizer(), chat, p)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the story model and writes its folder.")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--steps", type=int, default=1600, metavar="N", help="default: 1600")
    given = parser.parse_args()
    torch.set_num_threads(2)
    trained = train(given.seed, given.steps)
    found, entropy = held_out(trained)
    count = sum(tensor.numel() for tensor in trained.values())
    print(f"{count} parameters; held out: loss {found:.4f}, grammar {entropy:.4f}, {found / entropy - 1:+.1%}")
    write(given.out, trained)


if __name__ == "__main__":
    main()
