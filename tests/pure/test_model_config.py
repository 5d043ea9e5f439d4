"""config.json: every spelling gives one ModelConfig; what is not built, missing or wrong is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pagetable.errors import ModelError, NotSupported
from worker.model_config import MAX_JSON_BYTES, ModelConfig
from worker.rope import RopeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = MISTRAL | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 4}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
GONE = object()


def read(folder: Path, values: dict[str, Any], generation: object = None) -> ModelConfig:
    values = {key: value for key, value in values.items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_a_llama_with_everything_left_out_takes_the_defaults_of_transformers(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"rms_norm_eps": GONE}) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=176,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope=RopeConfig("default", 10000.0),
        windows=(0, 0),
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (LLAMA | {"num_key_value_heads": 2}, {"num_kv_heads": 2}),
        (LLAMA | {"head_dim": 48}, {"head_dim": 48}),
        (LLAMA | {"head_dim": None}, {"head_dim": 16}),
        (LLAMA | {"attention_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": False}),
        (LLAMA | {"mlp_bias": True}, {"qkv_bias": False, "o_bias": False, "mlp_bias": True}),
        (LLAMA | {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        (LLAMA | {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        (LLAMA | {"torch_dtype": "bfloat16", "dtype": "float32"}, {"dtype": "float32"}),
        (LLAMA | {"bos_token_id": 7}, {"bos_token_id": 7}),
        (LLAMA | {"pretraining_tp": 1, "sliding_window": None, "num_experts": 0, "quantization_config": None}, {}),
        (MISTRAL, {"windows": (4096, 4096), "num_kv_heads": 2}),
        (MISTRAL | {"sliding_window": None, "num_key_value_heads": None}, {"windows": (0, 0), "num_kv_heads": 4}),
        (MISTRAL | {"sliding_window": 32, "layer_types": ["sliding_attention"] * 2}, {"windows": (32, 32)}),
        (MISTRAL | {"num_attention_heads": 8, "num_key_value_heads": GONE}, {"num_kv_heads": 8}),
        (QWEN2, {"qkv_bias": True, "o_bias": False, "qk_norm": False, "windows": (0, 0, 0, 0)}),
        (QWEN2 | {"attention_bias": False}, {"qkv_bias": True}),
        (QWEN2 | {"sliding_window": 131072, "use_sliding_window": False}, {"windows": (0, 0, 0, 0)}),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True}, {"windows": (0, 0, 0, 0)}),
        (
            QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
            {"windows": (0, 64, 64, 64)},
        ),
        (
            QWEN2
            | {
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 0,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            {"windows": (0, 64, 0, 64)},
        ),
        (QWEN3, {"qk_norm": True, "qkv_bias": False, "head_dim": 128}),
        (QWEN3 | {"head_dim": 32, "attention_bias": True}, {"head_dim": 32, "qkv_bias": True, "o_bias": True}),
    ],
)
def test_fields(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    config = read(tmp_path, values)
    assert {name: getattr(config, name) for name in expected} == expected


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_theta": 500000.0}, RopeConfig("default", 500000.0)),
        ({"rope_theta": 500000, "rope_scaling": None}, RopeConfig("default", 500000.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig("default", 5e5)),
        ({"rope_parameters": {"rope_theta": 5e5}}, RopeConfig("default", 5e5)),
        ({"rope_parameters": {}}, RopeConfig()),
        ({"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 1}}, RopeConfig()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig("linear", factor=2.0)),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}}, RopeConfig("linear", factor=2.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, RopeConfig("llama3", 5e5, 8.0, 1024)),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            RopeConfig("llama3", 5e5, 8.0, 1024),
        ),
        (
            {"original_max_position_embeddings": 1024, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            RopeConfig(
                "yarn", factor=2.0, original_max_position_embeddings=1024, attention_factor=0.1 * math.log(2) + 1
            ),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1.0}},
            RopeConfig("yarn", factor=1.0, original_max_position_embeddings=4096),
        ),
        (
            {"rope_parameters": YARN | {"factor": None}},
            RopeConfig(
                "yarn", factor=4.0, original_max_position_embeddings=1024, attention_factor=0.1 * math.log(4) + 1
            ),
        ),
        (
            {"rope_parameters": YARN | {"attention_factor": 1.25, "mscale": 2.0, "mscale_all_dim": 1.0}},
            RopeConfig("yarn", factor=4.0, original_max_position_embeddings=1024, attention_factor=1.25),
        ),
        (
            {
                "rope_parameters": YARN
                | {"mscale": 2.0, "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 0, "truncate": False}
            },
            RopeConfig(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=1024,
                attention_factor=(0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
                beta_fast=16.0,
                beta_slow=1.0,
                truncate=False,
            ),
        ),
    ],
)
def test_both_spellings_of_rope(tmp_path: Path, values: dict[str, Any], expected: RopeConfig) -> None:
    assert read(tmp_path, LLAMA | values).rope == expected


def test_frequencies() -> None:
    """By hand: theta 10000 and head_dim 4 give 1 and 0.01 rad per position, wavelengths of 6.28 and 628."""
    assert RopeConfig().inverse_frequencies(4) == (1.0, 0.01)
    assert RopeConfig("linear", factor=4.0).inverse_frequencies(4) == (0.25, 0.0025)
    # 100 / 628 = 0.16 turns are below low_freq_factor, 100 / 6.28 = 16 above high_freq_factor
    llama3 = RopeConfig("llama3", factor=8.0, original_max_position_embeddings=100)
    assert llama3.inverse_frequencies(4) == (1.0, 0.00125)
    # 1600 / 628 = 2.546 turns lie between 1 and 4: smooth = 0.5155
    between = RopeConfig("llama3", factor=8.0, original_max_position_embeddings=1600).inverse_frequencies(4)
    smooth = (16 / (2 * math.pi) - 1) / 3
    assert between == (1.0, pytest.approx(0.01 * ((1 - smooth) / 8 + smooth), rel=1e-12))
    # yarn, from 16 positions on: no dimension turns 32 times, one turns once at 4 ln(16 / 2 pi) / 2 ln(10000) = 0.2
    yarn = RopeConfig("yarn", factor=4.0, original_max_position_embeddings=16)
    assert yarn.inverse_frequencies(4) == (1.0, 0.0025)
    assert RopeConfig("yarn", factor=4.0, original_max_position_embeddings=1).inverse_frequencies(4) == (1.0, 0.0025)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architectures: 'GPT2LMHeadModel' is not supported; known are LlamaFor",
        ),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "'Qwen2MoeForCausalLM' is not supported"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config: .* quantised weights are not supported",
        ),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map: .* code in model folders"),
        ({"trust_remote_code": True}, "trust_remote_code: got True"),
        ({"num_local_experts": 8}, "num_local_experts: got 8, but mixtures of experts are not supported"),
        ({"moe_intermediate_size": 8}, "moe_intermediate_size: got 8"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size: got 8192"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: got 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: got 30.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier: got 0.22"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    with pytest.raises(NotSupported, match=rf"^config\.json: .*{named}"):
        read(tmp_path, LLAMA | values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"architectures": GONE}, "architectures is missing, must name one of LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: got 'LlamaForCausalLM', must be a list of strings"),
        ({"architectures": ["LlamaForCausalLM", "x"]}, "architectures: got"),
        ({"model_type": "mistral"}, "model_type: got 'mistral', must be 'llama' as architectures says"),
        ({"vocab_size": GONE}, "vocab_size is missing, must be an integer from 1"),
        ({"vocab_size": "1000"}, "vocab_size: got '1000', must be an integer"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"vocab_size": 1 << 40}, "vocab_size: got 1099511627776"),
        ({"hidden_size": None}, "hidden_size: got None"),
        ({"hidden_size": 64.0}, "hidden_size: got 64.0"),
        ({"hidden_size": True}, "hidden_size: got True"),
        ({"hidden_size": 66}, "hidden_size: got 66, must be a multiple of num_attention_heads"),
        ({"intermediate_size": GONE}, "intermediate_size is missing"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: got -1"),
        ({"num_attention_heads": 1 << 20}, "num_attention_heads: got"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, must divide num_attention_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: got 8, must be an integer from 1 to 4"),
        ({"head_dim": 15}, "head_dim: got 15, must be even"),
        ({"head_dim": 258}, "head_dim: got 258, must be an integer from 2 to 256"),
        ({"max_position_embeddings": GONE}, "max_position_embeddings is missing"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: got '1e-5', must be a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: got 0"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', must be 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp: got 2, must be 1"),
        ({"attention_bias": "yes"}, "attention_bias: got 'yes', must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1"),
        ({"dtype": "float64"}, "dtype: got 'float64', must be one of float32, bfloat16, float16"),
        ({"torch_dtype": 3}, "torch_dtype: got 3"),
        ({"eos_token_id": 1000}, "eos_token_id: got 1000, must be a token id below 1000"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id: got"),
        ({"bos_token_id": -1}, "bos_token_id: got -1"),
        ({"sliding_window": 4096}, "sliding_window: got 4096, must be null"),
        ({"layer_types": ["full_attention"]}, "layer_types: got .* must name 2 layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types: got .* must hold only"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: got .* must agree with sliding_window"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window: got 0"),
        (MISTRAL | {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, "layer_types: .* must agree"),
        (MISTRAL | {"attention_bias": True}, "attention_bias: got True, must be false for this architecture"),
        (QWEN2 | {"mlp_bias": True}, "mlp_bias: got True, must be false for this architecture"),
        (QWEN2 | {"use_sliding_window": "no"}, "use_sliding_window: got 'no'"),
        (
            QWEN2 | {"layer_types": ["sliding_attention"] * 4},
            "layer_types: got .* use_sliding_window or sliding_window is",
        ),
        ({"partial_rotary_factor": 0.5}, "rope_parameters: partial_rotary_factor: got 0.5, must be 1"),
        ({"rope_scaling": "linear"}, "rope_scaling: got 'linear', must be an object"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling: type: got 'dynamic', must be one of default",
        ),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling: type: got 'su'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type: got 'longrope'"),
        ({"rope_parameters": {"rope_type": 1}}, "rope_parameters: rope_type: got 1"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "type: got 'linear', must equal rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor: got 0"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling: factor: got True"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}},
            "rope_scaling: 'mrope_section' is not",
        ),
        (
            {"rope_scaling": {"mrope_section": [1]}},
            "rope_scaling: 'mrope_section' is not known for rope_type 'default'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": None}}, "low_freq_factor: got None"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}},
            "high_freq_factor: got 1, must be ab",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling: truncate: got 1"),
        ({"rope_scaling": YARN | {"finetuned": True}}, "rope_scaling: 'finetuned' is not known for rope_type 'yarn'"),
        ({"rope_theta": 1}, "rope_theta: got 1"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta: got 10000.0, must equal rope_param"),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 5e5}},
            "rope_scaling: got .* must equal rope_parameters",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "'full_attention' gives layers their own rope"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 9},
            "original_max_position_embeddings: got 9, must eq",
        ),
    ],
)
def test_wrong_fields_are_refused_by_name(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        read(tmp_path, LLAMA | values)
    assert str(caught.value).startswith("config.json: ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "is not valid JSON"),
        (b"[1]", r"holds \[1\], must hold one JSON object"),
        (b"\xff{}", "is not UTF-8"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' stands twice"),
        (b'{"rope_scaling": {"factor": 1, "factor": 2}}', "the key 'factor' stands twice"),
        (b'{"rms_norm_eps": NaN}', "holds NaN"),
        (b'{"rms_norm_eps": -Infinity}', "holds -Infinity"),
        (b'{"rms_norm_eps": 1e999}', "holds the number '1e999'"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": "' + b"x" * MAX_JSON_BYTES + b'"}', "has more than 1048576 bytes"),
        (b"{'a': 1}", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_that_are_no_strict_json_are_refused(tmp_path: Path, text: bytes, named: str, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ModelError, match=f"^{name}: {named}"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, ()),
        (2, None, (2,)),
        ([2, 3, 2], None, (2, 3)),
        (2, {}, (2,)),
        (2, {"eos_token_id": None}, (2,)),
        (2, {"eos_token_id": 5}, (5,)),
        (2, {"eos_token_id": [5, 2]}, (5, 2)),
    ],
)
def test_end_tokens_are_those_of_the_generation_config_first(
    tmp_path: Path, config: object, generation: object, expected: tuple[int, ...]
) -> None:
    assert read(tmp_path, LLAMA | {"eos_token_id": config}, generation).eos_token_ids == expected


def test_a_wrong_end_token_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"^generation_config\.json: eos_token_id: got \[5000\], must be a token id below"
    ):
        read(tmp_path, LLAMA, {"eos_token_id": [5000]})


def test_code_in_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit")
    with pytest.raises(NotSupported, match=r"the folder holds code \('modeling_evil.py'\), which is never run"):
        read(tmp_path, LLAMA)


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder, must be a Hugging Face model folder"):
        ModelConfig.from_folder(tmp_path / "none")
    with pytest.raises(ModelError, match=r"^config\.json: there is no such file in the model folder"):
        ModelConfig.from_folder(tmp_path)


def test_the_tensors_of_a_model(tmp_path: Path) -> None:
    shapes = read(tmp_path, QWEN3 | {"num_hidden_layers": 1, "head_dim": 32, "attention_bias": True}).tensor_shapes()
    layer = {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "self_attn.q_norm.weight": (32,),
        "self_attn.k_norm.weight": (32,),
        "self_attn.q_proj.weight": (128, 64),
        "self_attn.q_proj.bias": (128,),
        "self_attn.k_proj.weight": (64, 64),
        "self_attn.k_proj.bias": (64,),
        "self_attn.v_proj.weight": (64, 64),
        "self_attn.v_proj.bias": (64,),
        "self_attn.o_proj.weight": (64, 128),
        "self_attn.o_proj.bias": (64,),
        "mlp.gate_proj.weight": (176, 64),
        "mlp.up_proj.weight": (176, 64),
        "mlp.down_proj.weight": (64, 176),
    }
    assert shapes == {
        "model.embed_tokens.weight": (1000, 64),
        **{f"model.layers.0.{name}": shape for name, shape in layer.items()},
        "model.norm.weight": (64,),
        "lm_head.weight": (1000, 64),
    }
    assert "lm_head.weight" not in read(tmp_path, LLAMA | {"tie_word_embeddings": True}).tensor_shapes()
