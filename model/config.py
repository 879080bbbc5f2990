"""The config table `[model]`: the network, independent of how it is trained or distributed. Imports no torch.

Each part is a union of kinds, which are described, one a file, in `parts/`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from triplane.model.part import as_tuple, default_kind
from triplane.model.parts.alibi import Alibi
from triplane.model.parts.experts import Experts
from triplane.model.parts.further import PredictFurther
from triplane.model.parts.gated import Gated
from triplane.model.parts.latent import Latent
from triplane.model.parts.learned import LearnedPositions
from triplane.model.parts.no_positions import NoPositions
from triplane.model.parts.plain import Plain
from triplane.model.parts.relative import RelativePositions
from triplane.model.parts.rms import RmsNorm
from triplane.model.parts.rotary import Rotary
from triplane.model.parts.sinusoidal import SinusoidalPositions
from triplane.model.parts.softmax import AnyNorm, Softmax
from triplane.model.weights import Axis

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27, "meta": 2**27}
"""Logits per chunk of the head: about what a CPU's caches hold; half a GiB in fp32 on a GPU, which needs large
products. Meta stands for a GPU."""

_DEFAULT_KINDS = {"attention": "softmax", "feed_forward": "gated", "positions": "rotary"}
AnyAttention = Annotated[Softmax | Latent, Field(discriminator="kind"), default_kind(_DEFAULT_KINDS["attention"])]
AnyFeedForward = Annotated[
    Gated | Plain | Experts, Field(discriminator="kind"), default_kind(_DEFAULT_KINDS["feed_forward"])
]
AnyPositions = Annotated[
    Rotary | LearnedPositions | SinusoidalPositions | Alibi | RelativePositions | NoPositions,
    Field(discriminator="kind"),
    default_kind(_DEFAULT_KINDS["positions"]),
]


_PLACES = {"pre": ("norm",), "post": ("stream_norm",), "output": ("post_norm",), "sandwich": ("norm", "post_norm")}
"""Norms of a branch by placement: of its input, of its output, of the stream after it was added."""

_SHORT_KEYS = {
    "n_heads": ("attention", "n_heads"),
    "n_kv_heads": ("attention", "n_kv_heads"),
    "head_dim": ("attention", "head_dim"),
    "qkv_bias": ("attention", "qkv_bias"),
    "hidden_dim": ("feed_forward", "hidden_dim"),
    "rope_base": ("positions", "base"),
    "rope_scaling": ("positions", "scaling"),
    "norm_eps": ("norm", "eps"),
}
"""Keys of `[model]` that stand for a key of a part, so that a Llama needs no further tables."""


_UNSET = "unset"
"""Stands for None in `layers`, since TOML has no null."""


class Layer(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Changes that some layers make: tables with only the keys that differ from the model's."""

    repeat: PositiveInt = 1
    """Consecutive layers with these changes."""
    attention: AnyAttention | None = None
    """Changes of attention, such as its window."""
    feed_forward: AnyFeedForward | None = None
    """Changes of the feed-forward part."""
    positions: AnyPositions | None = None
    """Changes of the positions, such as their base; without weights."""


class ModelConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A decoder-only transformer.

    In place of their tables, `n_heads`, `n_kv_heads`, `head_dim`, `qkv_bias`, `hidden_dim`, `rope_base`, `rope_scaling`
    and `norm_eps` may stand here.
    """

    short_keys: ClassVar = _SHORT_KEYS

    vocab_size: int = Field(gt=0, le=2**31 - 1)
    """Token ids run from 0 to `vocab_size - 1`; must equal the tokenizer's."""
    dim: int = Field(gt=0, le=2**31 - 1)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0, le=10_000)
    """Number of blocks."""
    attention: AnyAttention
    """Attention of all layers."""
    feed_forward: AnyFeedForward
    """Feed-forward part of all layers."""
    positions: AnyPositions = Rotary()
    """How the network learns where a token stands."""
    norm: AnyNorm = RmsNorm()
    """Norm of blocks and before the head."""
    norm_placement: Literal["pre", "post", "output", "sandwich"] = "pre"
    """`pre`: of each branch's input (GPT-2). `post`: of the stream after each branch, with none before the head
    (Vaswani et al. 2017). `output`: of each branch's output (OLMo 2). `sandwich`: of both (Gemma 2)."""
    residual: Literal["serial", "parallel", "parallel_shared_norm"] = "serial"
    """`parallel`: attention and feed-forward read the same stream (GPT-NeoX); `parallel_shared_norm`: after one norm
    (GPT-J, Cohere)."""
    residual_scale: PositiveFloat = 1.0
    """Multiplies what each branch adds (Granite)."""
    layers: Annotated[tuple[Layer, ...], Field(strict=False), BeforeValidator(as_tuple)] = ()
    """Changes layer by layer, repeated over the depth: [{ attention = { window = 4096 } }, {}] gives every other layer
    a window. "unset" takes away what the model has. Empty: all layers are equal."""
    embedding_scale: PositiveFloat = 1.0
    """Multiplies the embeddings; sqrt(dim) in Vaswani et al. 2017 and Gemma."""
    embedding_norm: AnyNorm | None = None
    """Norm of the embeddings, as in BLOOM. None: none."""
    tie_embeddings: bool = False
    """True: the output head is the embedding table."""
    head_bias: bool = False
    """True: the logits have a bias, as in GPT-J."""
    head_scale: PositiveFloat = 1.0
    """Multiplies the logits (Cohere)."""
    head_softcap: PositiveFloat | None = None
    """Logits z become softcap tanh(z / softcap) (Gemma 2). None: any."""
    predict_further: PredictFurther | None = None
    """Modules that predict tokens after the next one in training (DeepSeek-V3). None: none."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; `init_std / sqrt(2 n_layers)` for those that write to the residual
    stream (GPT-2)."""
    z_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared log-partition in the loss, which keeps logits small (PaLM, section 5)."""

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, values: Any) -> Any:
        """Moves short keys into their tables, and completes the tables of `layers`.

        A key that is given in both ways stays, and is reported as unknown.
        """
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for short, (table, key) in _SHORT_KEYS.items():
            whole = values.get(table, {})
            if short in values and isinstance(whole, dict) and key not in whole:
                values[table] = {**whole, key: values.pop(short)}
        if isinstance(values.get("layers"), list | tuple):
            values["layers"] = [_completed(layer, values) for layer in values["layers"]]
        return values

    def as_tables(self) -> dict[str, Any]:
        """Returns the values as a TOML file says them: without None, and of layers only what they change."""
        values = self.model_dump(mode="json", exclude_none=True)
        return values | ({"layers": [_changes(layer, self) for layer in self.layers]} if self.layers else {})

    @property
    def stream(self) -> Axis:
        """The axis of the residual stream."""
        return Axis("dim", self.dim)

    @property
    def block_norms(self) -> list[str]:
        """The names of the norms of each block."""
        branches = ["attention"] if self.residual == "parallel_shared_norm" else ["attention", "feed_forward"]
        return [f"{branch}_{place}" for branch in branches for place in _PLACES[self.norm_placement]]

    @property
    def final_norm(self) -> bool:
        """True if there is a norm before the head; with `post` the last block ends in one."""
        return self.norm_placement != "post"

    @property
    def pattern(self) -> tuple[Layer, ...]:
        """The layers of one period, complete; layer i is `pattern[i % len(pattern)]`."""
        whole = {"attention": self.attention, "feed_forward": self.feed_forward, "positions": self.positions}
        pattern: list[Layer] = []
        for layer in self.layers or (Layer(),):
            complete = {key: getattr(layer, key) or part for key, part in whole.items()}
            pattern += [layer.model_copy(update={"repeat": 1} | complete)] * layer.repeat
        return tuple(pattern)

    @property
    def period(self) -> int:
        """Layers after which their kinds repeat."""
        return sum(layer.repeat for layer in self.layers) or 1

    @property
    def n_blocks(self) -> int:
        """Layers, and those of modules that predict further."""
        return self.n_layers + (0 if self.predict_further is None else self.predict_further.depth)

    def layer(self, number: int) -> Layer:
        """Returns the complete layer `number`; those of modules that predict further are like the last one."""
        return self.pattern[number % self.period if number < self.n_layers else -1]

    @property
    def all_positions(self) -> tuple[AnyPositions, ...]:
        """The model's positions, then others that layers have, each once."""
        return tuple(dict.fromkeys([self.positions, *(layer.positions for layer in self.pattern if layer.positions)]))

    @property
    def longest(self) -> int | None:
        """The longest sequence that its positions number; None: any."""
        return min((kind.limit for kind in self.all_positions if kind.limit is not None), default=None)

    def problems(self) -> Iterator[str]:
        """Yields what keys of different tables contradict, a line each with its operands."""
        period = self.period
        if self.n_layers % period:
            multiple = self.n_layers + -self.n_layers % period
            yield (
                f"layers repeat every {period}, which does not divide n_layers ({self.n_layers}); the next multiple is "
                f"{multiple}"
            )
        if self.residual != "serial" and self.norm_placement != "pre":
            yield f'residual "{self.residual}" requires norm_placement "pre", not "{self.norm_placement}"'
        heads, widths = {self.attention.n_heads}, {self.attention.turning_dim}
        for layer in dict.fromkeys(self.pattern):
            assert layer.attention is not None and layer.feed_forward is not None and layer.positions is not None
            attention, positions = layer.attention, layer.positions
            yield from layer.feed_forward.problems()
            heads.add(attention.n_heads)
            widths.add(attention.turning_dim)
            if attention.n_heads % attention.n_kv_heads:
                yield (
                    f"n_heads ({attention.n_heads}) is not a multiple of n_kv_heads ({attention.n_kv_heads}); the next "
                    f"multiple is {attention.n_heads + -attention.n_heads % attention.n_kv_heads}"
                )
            yield from positions.problems(self.dim, attention.turning_dim)
            own_weights = list(positions.weights(self.dim, attention.n_heads))
            if positions != self.positions and (positions.in_embedding or own_weights):
                yield f'layers: positions of kind "{positions.kind}" serve the whole network; set model.positions'
        if len(heads) > 1 and any(positions.by_head for positions in self.all_positions):
            yield f"layers have {' and '.join(map(str, sorted(heads)))} heads, but positions that differ by head"
        if len(widths) > 1:
            yield f"layers have a head_dim of {' and '.join(map(str, sorted(widths)))}; all must have the same"

    def length_problems(self, seq_len: int) -> Iterator[str]:
        """Yields why sequences of this many tokens do not fit the network."""
        for positions in self.all_positions:
            if positions.limit is not None and positions.limit < seq_len:
                yield f"{positions.kind} positions number {positions.limit} tokens, but seq_len is {seq_len}"
        windows = {layer.attention.window for layer in self.pattern if layer.attention and layer.attention.window}
        for window in sorted(windows):
            if window > seq_len:
                yield f"attention.window ({window}) is over seq_len ({seq_len}); leave it out, or set it lower"


def _completed(layer: Any, values: dict[str, Any]) -> Any:
    """Returns the tables of `layer` over the model's, unless they are of another kind."""
    if not isinstance(layer, dict):
        return layer
    whole = {}
    for key, changes in layer.items():
        base = values.get(key)
        if isinstance(base, BaseModel):
            base = base.model_dump()
        if isinstance(changes, dict) and isinstance(base, dict):
            kind = base.get("kind", _DEFAULT_KINDS.get(key))
            changes = {**base, **changes} if changes.get("kind", kind) == kind else changes
        if isinstance(changes, dict):
            changes = {name: None if value == _UNSET else value for name, value in changes.items()}
        whole[key] = changes
    return whole


def _changes(layer: Layer, model: ModelConfig) -> dict[str, Any]:
    """Returns the tables from which `_completed` makes this layer."""
    changes: dict[str, Any] = {"repeat": layer.repeat} if layer.repeat > 1 else {}
    for key in ("attention", "feed_forward", "positions"):
        own, usual = getattr(layer, key), getattr(model, key)
        if own is None:
            continue
        table = own.model_dump(mode="json", exclude_none=True)
        if own.kind == usual.kind:
            fields = [name for name in type(own).model_fields if getattr(own, name) != getattr(usual, name)]
            table = {name: table.get(name, _UNSET) for name in fields}
        changes[key] = table
    return changes
