"""What a model folder's config.json says, checked, or refused by name: a model is never half-read.

Missing fields take the defaults of transformers' own configuration class, so that both programs see one model.
A field that would change the computation in a way that is not built here is refused. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pagetable.errors import ModelError, NotSupported, shown
from worker.fields import Fields, read_object
from worker.rope import RopeConfig

MAX_JSON_BYTES = 1 << 20
MAX_POSITION = (1 << 31) - 1  # positions and windows travel as int32
MAX_HEAD_DIM = 256  # the kernels' limit
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class _Family:
    """How an architecture differs from Llama.

    Attributes:
        model_type: config.json's other name for the architecture.
        kv_heads: num_key_value_heads where config.json has no such field; 0 is num_attention_heads.
        head_dim: head_dim where config.json has no such field; 0 is hidden_size / num_attention_heads.
        qkv_bias: whether q, k and v always have biases (and o never).
        attention_bias, mlp_bias: whether the field of that name is the family's to set.
        qk_norm: whether queries and keys are normalised per head.
        window: "none", "all" layers, or "by_layer".
    """

    model_type: str
    kv_heads: int = 32
    head_dim: int = 0
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: str = "by_layer"


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", kv_heads=0, attention_bias=True, mlp_bias=True, window="none"),
    "MistralForCausalLM": _Family("mistral", kv_heads=8, window="all"),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", head_dim=128, attention_bias=True, qk_norm=True),
}

# Fields that other models of these families, or forks of them, use to change what is computed: field -> what it is.
_UNBUILT = {
    "quantization_config": "quantised weights",
    "compression_config": "quantised weights",
    "num_local_experts": "mixtures of experts",
    "num_experts": "mixtures of experts",
    "n_routed_experts": "mixtures of experts",
    "num_experts_per_tok": "mixtures of experts",
    "moe_intermediate_size": "mixtures of experts",
    "mlp_only_layers": "mixtures of experts",
    "decoder_sparse_step": "mixtures of experts",
    "attention_chunk_size": "chunked attention",
    "attn_logit_softcapping": "capped logits",
    "final_logit_softcapping": "capped logits",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
    "query_pre_attn_scalar": "another attention scale",
    "attention_multiplier": "another attention scale",
    "embedding_multiplier": "scaled embeddings",
    "residual_multiplier": "scaled residuals",
    "no_rope_layers": "layers without rope",
    "per_layer_config": "layers of their own shape",
    "trust_remote_code": "code in model folders",
    "auto_map": "code in model folders",
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder's shape and constants.

    Attributes:
        windows: per layer, how many positions a query sees, its own included; 0 is all.
        qkv_bias, o_bias, mlp_bias: which projections add a bias.
        qk_norm: whether queries and keys are normalised per head before rotation.
        dtype: of the weights as saved (float32, bfloat16, float16), or None where config.json does not say.
        eos_token_ids: what ends a text, generation_config.json's where it names any, else config.json's.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    dtype: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config.json: num_key_value_heads: got {self.num_kv_heads}, "
                f"must divide num_attention_heads ({self.num_heads})"
            )
        if self.head_dim % 2:
            raise ModelError(f"config.json: head_dim: got {self.head_dim}, must be even to be rotated")
        if len(self.windows) != self.num_layers:
            raise ModelError(f"config.json: layer_types: got {len(self.windows)}, must name {self.num_layers} layers")

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read config.json and generation_config.json of a Hugging Face model folder.

        Errors: ModelError names the file, the field and the limit; NotSupported names what is not built.
        """
        folder = Path(folder)
        try:
            return cls._read(folder)
        except OSError as error:  # a part of the path may not be entered, or is too long
            raise ModelError(f"model: {shown(str(folder))} cannot be read ({error.strerror})") from None

    @classmethod
    def _read(cls, folder: Path) -> ModelConfig:
        if not folder.is_dir():
            raise ModelError(f"model: {shown(str(folder))} is no folder, must be a Hugging Face model folder")
        code = sorted(path.name for path in folder.glob("*.py"))
        if code:
            raise NotSupported(f"model: the folder holds code ({shown(code[0])}), which is never run; remove it")
        config = Fields(read_object(folder / "config.json", MAX_JSON_BYTES), "config.json")
        generation = Fields({}, "generation_config.json")
        if (folder / generation.name).exists():
            generation = Fields(read_object(folder / generation.name, MAX_JSON_BYTES), generation.name)
        return cls.from_fields(config, generation)

    @classmethod
    def from_fields(cls, config: Fields, generation: Fields) -> ModelConfig:
        """As `from_folder`, from the two objects read already."""
        architecture, family = _family(config)
        _refuse_unbuilt(config, family)
        vocab_size = config.integer("vocab_size", 1, 1 << 24)
        hidden_size = config.integer("hidden_size", 1, 1 << 20)
        num_layers = config.integer("num_hidden_layers", 1, 4096)
        num_heads = config.integer("num_attention_heads", 1, 4096)
        attention_bias = family.attention_bias and config.boolean("attention_bias", False)
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=config.integer("intermediate_size", 1, 1 << 22),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(config, family, num_heads),
            head_dim=_head_dim(config, family, hidden_size, num_heads),
            max_position_embeddings=config.integer("max_position_embeddings", 1, MAX_POSITION),
            rms_norm_eps=config.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
            rope=RopeConfig.from_fields(config),
            windows=_windows(config, family, num_layers),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family.mlp_bias and config.boolean("mlp_bias", False),
            qk_norm=family.qk_norm,
            tie_word_embeddings=config.boolean("tie_word_embeddings", False),
            dtype=_dtype(config),
            eos_token_ids=_token_ids(generation, "eos_token_id", vocab_size)
            or _token_ids(config, "eos_token_id", vocab_size),
            bos_token_id=next(iter(_token_ids(config, "bos_token_id", vocab_size)), None),
        )

    @property
    def harmless_tensors(self) -> frozenset[str]:
        """What a folder may hold beside `tensor_shapes`: a tied model's copy of its embeddings."""
        return frozenset({"lm_head.weight"} if self.tie_word_embeddings else ())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the weights must hold -> its shape, in the order of the computation."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q, self.o_bias),
            "mlp.gate_proj": (mlp, hidden, self.mlp_bias),
            "mlp.up_proj": (mlp, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, mlp, self.mlp_bias),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if self.qk_norm:
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, size in norms.items():
                shapes[f"{prefix}{name}.weight"] = (size,)
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def _family(config: Fields) -> tuple[str, _Family]:
    names = config.strings("architectures")
    known = ", ".join(_FAMILIES)
    if len(names) != 1:
        config.refuse("architectures", f"name one of {known}")
    if names[0] not in _FAMILIES:
        raise NotSupported(f"config.json: architectures: {shown(names[0])} is not supported; known are {known}")
    family = _FAMILIES[names[0]]
    if config.text("model_type", family.model_type) != family.model_type:
        config.refuse("model_type", f"be {family.model_type!r} as architectures says {names[0]}")
    return names[0], family


def _refuse_unbuilt(config: Fields, family: _Family) -> None:
    for field, what in _UNBUILT.items():
        if config.values.get(field) not in (None, False, 0, [], {}):
            raise NotSupported(
                f"config.json: {field}: got {shown(config.values[field])}, but {what} are not supported; "
                f"take a model without"
            )
    # Qwen2 has its biases whatever attention_bias says; transformers does not read the field there
    for field, free in (("attention_bias", family.attention_bias or family.qkv_bias), ("mlp_bias", family.mlp_bias)):
        if not free and config.boolean(field, False):
            config.refuse(field, "be false for this architecture")
    if config.text("hidden_act", "silu") != "silu":
        config.refuse("hidden_act", "be 'silu', the one that is supported")
    if config.integer("pretraining_tp", 1, 1 << 16, 1) != 1:
        config.refuse("pretraining_tp", "be 1: sums split as in pretraining are not supported")


def _num_kv_heads(config: Fields, family: _Family, num_heads: int) -> int:
    default = num_heads
    if "num_key_value_heads" not in config.values and family.kv_heads:
        default = family.kv_heads
    return config.integer("num_key_value_heads", 1, num_heads, default)


def _head_dim(config: Fields, family: _Family, hidden_size: int, num_heads: int) -> int:
    if "head_dim" not in config.values and family.head_dim:
        return family.head_dim
    if not config.given("head_dim") and hidden_size % num_heads:
        config.refuse("hidden_size", f"be a multiple of num_attention_heads ({num_heads}) where head_dim is not given")
    return config.integer("head_dim", 2, MAX_HEAD_DIM, hidden_size // num_heads)


def _windows(config: Fields, family: _Family, num_layers: int) -> tuple[int, ...]:
    types = config.strings("layer_types")
    if types and len(types) != num_layers:
        config.refuse("layer_types", f"name {num_layers} layers (num_hidden_layers)")
    if set(types) - {"full_attention", "sliding_attention"}:
        config.refuse("layer_types", "hold only 'full_attention' and 'sliding_attention'")
    window = _window(config, family)
    if family.window == "by_layer":
        first = config.integer("max_window_layers", 0, 1 << 16, 28)
        sliding = tuple(t == "sliding_attention" for t in types) or tuple(
            window > 0 and layer >= first for layer in range(num_layers)
        )
        if any(sliding) and not window:
            config.refuse("layer_types", "name no sliding_attention where use_sliding_window or sliding_window is off")
        return tuple(window if slides else 0 for slides in sliding)
    if any((t == "sliding_attention") != (window > 0) for t in types):
        config.refuse("layer_types", "agree with sliding_window: this architecture has one kind of layer")
    return (window,) * num_layers


def _window(config: Fields, family: _Family) -> int:
    """The sliding window of the layers that have one; 0 where there is none."""
    if family.window == "by_layer" and not config.boolean("use_sliding_window", False):
        return 0
    if family.window == "none":
        if config.given("sliding_window"):
            config.refuse("sliding_window", "be null: this architecture has no sliding window")
        return 0
    if "sliding_window" not in config.values:
        return 4096
    return config.integer("sliding_window", 1, MAX_POSITION) if config.given("sliding_window") else 0


def _dtype(config: Fields) -> str | None:
    """`dtype` wins over the older `torch_dtype`, as in transformers."""
    field = "dtype" if config.given("dtype") else "torch_dtype"
    if not config.given(field):
        return None
    name = config.text(field)
    if name not in DTYPES:
        config.refuse(field, f"be one of {', '.join(DTYPES)}")
    return name


def _token_ids(fields: Fields, field: str, vocab_size: int) -> tuple[int, ...]:
    """A token id or a list of them; empty where missing or null."""
    value = fields.values.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
        fields.refuse(field, f"be a token id below {vocab_size} (vocab_size), or a list of them")
    return tuple(dict.fromkeys(ids))
