"""config.json of a Hugging Face folder as a model config, with transformers' own defaults where it is silent."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from triplane.hf.families import FAMILIES, family_problem
from triplane.model.config import ModelConfig
from triplane.model.parts.gated import Gated
from triplane.model.parts.rms import RmsNorm
from triplane.model.parts.rotary import LinearScaling, Llama3Scaling, Rotary, Scaling
from triplane.model.parts.softmax import Softmax
from triplane.storage.errors import ModelError
from triplane.storage.foreign import first_problem

Size = Annotated[int, Field(gt=0, le=2**20)]
"""Largest size of a dim. The bound keeps the bytes of any weight within 64 bits."""
_One = Annotated[float, Field(ge=1, le=1)]


class _Schema(BaseModel, strict=True, frozen=True, allow_inf_nan=False):
    """Keys that are not named have no bearing on what the model computes."""


class _Rope(_Schema, frozen=True, extra="allow"):
    """`rope_parameters`, as transformers 5 writes it, or `rope_scaling`, as 4 does."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: PositiveFloat | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None
    partial_rotary_factor: _One | None = None


class HfConfig(_Schema, frozen=True):
    """The keys that affect the computation, by Hugging Face's names."""

    vocab_size: Annotated[int, Field(gt=0, le=2**24)]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    original_max_position_embeddings: PositiveInt | None = None
    partial_rotary_factor: _One | None = None
    tie_word_embeddings: bool | None = False
    initializer_range: NonNegativeFloat = 0.02
    attention_bias: bool = False
    attention_out_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    clip_qkv: float | None = None
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool | None = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None


def from_hf_config(hf: object, where: str = "config.json") -> ModelConfig:
    """The model that the content of a config.json describes, with the loss weights at their defaults.

    Raises ModelError, one line that begins with `where`, for anything that this model cannot compute.
    """
    return to_model_config(parse_hf_config(hf, where), where)


def to_model_config(parsed: HfConfig, where: str) -> ModelConfig:
    """The model of a config.json that `parse_hf_config` has read; raises ModelError as `from_hf_config`."""
    try:
        return ModelConfig(
            vocab_size=parsed.vocab_size,
            dim=parsed.hidden_size,
            n_layers=parsed.num_hidden_layers,
            attention=Softmax(
                n_heads=parsed.num_attention_heads,
                n_kv_heads=parsed.num_key_value_heads or parsed.num_attention_heads,
                head_dim=parsed.head_dim or max(1, parsed.hidden_size // parsed.num_attention_heads),
                qkv_bias=parsed.attention_bias,
            ),
            feed_forward=Gated(hidden_dim=parsed.intermediate_size),
            positions=Rotary(
                base=_rope(parsed).rope_theta or parsed.rope_theta or 10_000.0, scaling=_rope_scaling(parsed)
            ),
            norm=RmsNorm(eps=parsed.rms_norm_eps),
            tie_embeddings=bool(parsed.tie_word_embeddings),
            init_std=parsed.initializer_range or 0.02,
        )
    except ValidationError as error:
        raise ModelError(f"{where}: {first_problem(error)}") from None
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def parse_hf_config(hf: object, where: str) -> HfConfig:
    """The checked content of a config.json, absent keys filled in; raises ModelError as `from_hf_config`."""
    if not isinstance(hf, dict):
        raise ModelError(f"{where}: holds no table of keys; give a Hugging Face folder")
    if problem := family_problem(hf):
        raise ModelError(f"{where}: {problem}")
    family = hf["model_type"]
    fixed: dict[str, Any] = {}
    if family == "mistral":  # whatever the file says, it has no such biases
        fixed = {"attention_bias": False, "mlp_bias": False}
    elif family == "qwen2":
        fixed = {"attention_bias": True, "mlp_bias": False}
    elif family == "internlm3":
        names = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}
        fixed = {ours: hf[theirs] for theirs, ours in names.items() if theirs in hf}
    try:
        parsed = HfConfig.model_validate(FAMILIES[family] | hf | fixed)
    except ValidationError as error:
        raise ModelError(f"{where}: {first_problem(error)}") from None
    if family == "iquestcoder" and parsed.clip_qkv is not None:
        raise ModelError(f"{where}: clip_qkv is {parsed.clip_qkv}; this model does not clip")
    if problem := _heads_problem(parsed) or _window_problem(family, parsed):
        raise ModelError(f"{where}: {problem}")
    return parsed


def _heads_problem(hf: HfConfig) -> str | None:
    heads, shared = hf.num_attention_heads, hf.num_key_value_heads
    if shared and heads % shared:
        return f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({shared})"
    if (width := hf.head_dim or hf.hidden_size // heads) % 2 or not width:
        return f"heads are {width} wide (head_dim, or hidden_size / num_attention_heads), not an even number"
    return None


def _window_problem(family: str, hf: HfConfig) -> str | None:
    """A window that hides tokens within the context. Each family heeds other keys; Llama has no window."""
    window = None
    if family == "mistral":
        window = hf.sliding_window
    elif family == "qwen2":
        if hf.layer_types is not None:
            windowed = any(kind != "full_attention" for kind in hf.layer_types)
        else:
            windowed = bool(hf.use_sliding_window) and hf.max_window_layers < hf.num_hidden_layers
        if windowed and hf.sliding_window is None:
            return "layers have sliding windows, but sliding_window is null"
        window = hf.sliding_window if windowed else None
    elif family == "iquestcoder" and hf.use_sliding_window:
        window = hf.sliding_window
    if window is None or window >= hf.max_position_embeddings:
        return None
    return (
        f"sliding_window is {window} of {hf.max_position_embeddings} positions (max_position_embeddings); this model "
        f"attends to all of them"
    )


def _rope(hf: HfConfig) -> _Rope:
    """Returns the form that transformers reads, if both are present."""
    empty = _Rope()
    return next((rope for rope in (hf.rope_scaling, hf.rope_parameters) if rope not in (None, empty)), None) or empty


def _rope_scaling(hf: HfConfig) -> Scaling | None:
    rope = _rope(hf)
    if nested := [key for key, value in (rope.model_extra or {}).items() if isinstance(value, dict)]:
        raise ModelError(f"rope parameters of its own for {nested[0][:60]!r}; this model has the same in every layer")
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ModelError(f"rope_type is {kind[:60]!r}; this model has default, linear and llama3")
    needed: dict[str, float | int | None] = {"factor": rope.factor}
    if kind == "llama3":
        needed |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if absent := [key for key, value in needed.items() if value is None]:
        raise ModelError(f"rope_type is {kind!r}, but there is no {absent[0]}")
    assert rope.factor is not None
    if rope.factor == 1:
        return None
    if kind == "linear":
        return LinearScaling(kind="linear", factor=rope.factor)
    assert rope.low_freq_factor is not None and rope.high_freq_factor is not None
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise ModelError(
            f"low_freq_factor ({rope.low_freq_factor}) is not below high_freq_factor ({rope.high_freq_factor})"
        )
    original = hf.original_max_position_embeddings or rope.original_max_position_embeddings
    return Llama3Scaling(
        kind="llama3",
        factor=rope.factor,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        original_seq_len=original or hf.max_position_embeddings,
    )


def possible_windows(hf: dict[str, Any]) -> list[int]:
    """The numbers in a config.json that some reader might take for a window, whether this family heeds them or not."""
    return [
        value
        for key, value in hf.items()
        if ("window" in key or "chunk" in key) and isinstance(value, int) and not isinstance(value, bool)
    ]
