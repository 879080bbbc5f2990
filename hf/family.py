"""A Hugging Face family: one row says how its config.json and tensors stand for a model of ours. Imports no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import isclose
from typing import Any, NamedTuple

from pydantic import BaseModel, NonNegativeFloat, PositiveInt, ValidationError, create_model

from triplane.hf.tensors import Names, Stored, stored_tensors
from triplane.hf.traits import Hf, Trait, Values, Vocabulary, key, put, switch
from triplane.model.config import ModelConfig
from triplane.model.parts.attention import Attention
from triplane.storage.errors import ModelError
from triplane.storage.foreign import first_problem

_OURS_ALONE = ("init_std", "z_loss_weight")
"""Fields of the model that no reader of a Hugging Face folder needs."""


class _Schema(BaseModel, strict=True, frozen=True, allow_inf_nan=False):
    """Keys that are not named have no bearing on what the model computes."""


class Described(NamedTuple):
    """The model that a config.json describes."""

    family: "Family"
    model: ModelConfig
    context: int
    """`max_position_embeddings`."""


@dataclass(frozen=True, eq=False)
class Family:
    """A model type of transformers."""

    model_type: str
    architecture: str
    names: Names | Callable[[ModelConfig], Names]
    traits: tuple[Trait, ...]
    """Their keys of config.json, in the order in which they are read."""
    fixed: Values = field(default_factory=dict)
    """Values that all models of the family share, by paths such as `norm.kind`."""
    derived: Callable[[Values], Values] = lambda model: {}
    """Further values, which follow from others."""
    written: bool = True
    """False: models are read from it, but not written to it."""
    nested: str | None = None
    """The table of config.json that describes the text model."""
    tokenizer: str | None = None
    """The tokenizer class that transformers takes whatever tokenizer_config.json says; None: it takes that one."""
    zero_biases: bool = False
    """True: biases that its models have and ours lacks are written as zeros."""
    problem: Callable[[Hf], str | None] = lambda hf: None
    """Says why the model cannot be computed, if keys without a value of ours make it so."""

    def names_of(self, config: ModelConfig) -> Names:
        """Returns the names of the modules of this model."""
        return self.names(config) if callable(self.names) else self.names

    def tensors(self, config: ModelConfig) -> dict[str, Stored]:
        """Returns every tensor of this model by its name."""
        return stored_tensors(self.names_of(config), config)

    @cached_property
    def schema(self) -> type[BaseModel]:
        """The keys of config.json that affect the computation."""
        fields: Any = {name: found for trait in self.traits for name, found in trait.keys.items()}
        return create_model(self.model_type, __base__=_Schema, **fields)

    def read(self, content: Hf) -> Described:
        """Returns what a config.json describes; raises ModelError without the name of the file."""
        hf = self._checked(content)
        if problem := self.problem(hf):
            raise ModelError(problem)
        model: Values = {"attention": {}, "feed_forward": {}, "norm": {}, "layers": []}
        for path, value in self.fixed.items():
            put(model, path, dict(value) if isinstance(value, dict) else value)
        for trait in self.traits:
            trait.read(hf, model)
        for path, value in self.derived(model).items():
            put(model, path, value)
        context = hf["max_position_embeddings"]
        for table in [model, *model["layers"]]:
            if (table["attention"].get("window") or 0) >= context:
                table["attention"]["window"] = None  # hides nothing
        try:
            config = ModelConfig.model_validate(_folded(model))
        except ValidationError as error:
            raise ModelError(first_problem(error)) from None
        if problem := next(config.problems(), None):
            raise ModelError(problem)
        return Described(self, config, context)

    def _checked(self, content: Hf) -> Hf:
        aliases = {alias: name for trait in self.traits for alias, name in trait.aliases.items()}
        given = {aliases[name]: value for name, value in content.items() if name in aliases} | {
            name: value for name, value in content.items() if name not in aliases
        }
        try:
            parsed = self.schema.model_validate(given)
        except ValidationError as error:
            raise ModelError(first_problem(error)) from None
        return {name: getattr(parsed, name) for name in self.schema.model_fields}

    def write(self, config: ModelConfig, context: int) -> Hf:
        """Returns the config.json of the model of this family that is nearest to `config`."""
        model = config.model_dump(mode="json")
        layers = (config.layer(number) for number in range(config.n_layers))
        model["layers"] = [layer.model_dump(mode="json") for layer in layers]
        model["attention"] |= _implied(config.attention)
        limit = config.longest
        hf: Hf = {"model_type": self.model_type, "architectures": [self.architecture], "pad_token_id": None}
        hf["max_position_embeddings"] = context if limit is None else limit
        for trait in self.traits:
            trait.write(model, hf)
        return hf

    def nearest(self, config: ModelConfig, context: int) -> ModelConfig:
        """Returns the model that a reader will see; raises ModelError if transformers would refuse even that."""
        return self.read(self.write(config, context)).model

    def differences(self, config: ModelConfig, context: int) -> list[str]:
        """Returns a line for each field of the model that the family cannot express; none if it fits.

        Raises ModelError as `nearest` does.
        """
        ours, theirs = _spelled_out(config, context), _spelled_out(self.nearest(config, context), context)
        paths = [path for path in dict.fromkeys([*ours, *theirs]) if not _equal(ours.get(path), theirs.get(path))]
        if self.zero_biases:
            paths = [
                path for path in paths if not (path.endswith("bias") and _in_all(ours.get(path), theirs.get(path)))
            ]
        return [f"{path} is {_shown(ours.get(path))}, there {_shown(theirs.get(path))}" for path in paths]


def sizes(
    dim: str = "hidden_size",
    layers: str = "num_hidden_layers",
    context: str = "max_position_embeddings",
    *,
    longest: int,
    tied: bool = False,
    dim_also: tuple[str, ...] = (),
    layers_also: tuple[str, ...] = (),
    std: float = 0.02,
) -> tuple[Trait, ...]:
    """Returns the traits that every family has: sizes, context (`longest` by default), whether the head is tied."""
    return (
        key("vocab_size", "vocab_size", type=Vocabulary),
        key("initializer_range", "init_std", type=NonNegativeFloat, default=std, decode=lambda std: std or 0.02),
        key(dim, "dim", also=dim_also),
        Layers(layers, also=layers_also),
        Context(context, default=longest),
        switch("tie_word_embeddings", "tie_embeddings", default=tied),
    )


@dataclass(frozen=True)
class Layers(Trait):
    """The number of layers; makes a table of changes for each."""

    name: str
    also: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return key(self.name).keys

    @property
    def aliases(self) -> dict[str, str]:
        return dict.fromkeys(self.also, self.name)

    def read(self, hf: Hf, model: Values) -> None:
        model["n_layers"] = hf["num_hidden_layers"] = hf[self.name]
        model["layers"] = [{"attention": {}} for _ in range(hf[self.name])]

    def write(self, model: Values, hf: Hf) -> None:
        hf[self.name] = model["n_layers"]


@dataclass(frozen=True)
class Context(Trait):
    """Tokens of context."""

    name: str
    default: int

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {self.name: (PositiveInt, self.default)}

    def read(self, hf: Hf, model: Values) -> None:
        hf["max_position_embeddings"] = hf[self.name]

    def write(self, model: Values, hf: Hf) -> None:
        hf[self.name] = hf["max_position_embeddings"]


def _folded(model: Values) -> Values:
    """Returns the values with `layers` as a pattern of the changes that some layers have."""
    usual = {"window": None} | model["attention"]
    layers = []
    for layer in model.pop("layers"):
        changes = {name: value for name, value in layer["attention"].items() if value != usual.get(name)}
        own = {"attention": changes} if changes else {}
        own |= {key: layer[key] for key in ("feed_forward",) if key in layer}
        if layer.get("positions", model.get("positions")) != model.get("positions"):
            own["positions"] = layer["positions"]
        layers.append(own)
    if all(layer == layers[0] for layer in layers):
        return model | layers[0] | {"attention": model["attention"] | layers[0].get("attention", {})}
    period = next(
        n for n in range(1, len(layers) + 1) if len(layers) % n == 0 and layers == layers[:n] * (len(layers) // n)
    )
    return model | {"layers": list(_runs(layers[:period]))}


def _runs(layers: list[Values]) -> Iterator[Values]:
    """Yields layers, equal ones that follow each other as one with `repeat`."""
    start = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or layers[end] != layers[start]:
            yield layers[start] | ({"repeat": end - start} if end - start > 1 else {})
            start = end


def _spelled_out(config: ModelConfig, context: int) -> Values:
    """Returns every field by its path; those of parts for each run of equal layers."""
    by_layer = dict.fromkeys((*_OURS_ALONE, "layers", "attention", "feed_forward", "positions"), True)
    top = config.model_dump(exclude={**by_layer, "predict_further": {"weight"}})
    layers = [config.layer(number).model_dump() for number in range(config.n_layers)]
    for number, layer in enumerate(layers):
        if (layer["attention"].get("window") or 0) >= context:
            layer["attention"]["window"] = None
        attention = config.layer(number).attention
        assert attention is not None
        layer["attention"] |= _implied(attention)
        _without_added_losses(layer["feed_forward"])
    flat = dict(_flat(top, ""))
    flat |= dict(_flat(config.positions.model_dump(), "positions.")) if config.positions.limit is not None else {}
    for path in dict.fromkeys(path for layer in layers for path, _ in _flat(layer, "")):
        values = [dict(_flat(layer, "")).get(path) for layer in layers]
        flat[path] = values[0] if all(value == values[0] for value in values) else values
    return flat


def _without_added_losses(feed_forward: Values) -> None:
    """Removes what only training needs, and says whether there is a bias in the selection of experts."""
    feed_forward.pop("z_loss_weight", None)
    if (feed_forward.pop("balance", None) or {}).get("kind") == "bias":
        feed_forward["selection_bias"] = True


def _implied(attention: Attention) -> Values:
    """Returns what a kind of attention may not say, but have."""
    return {"scale": attention.rule().scale, "n_kv_heads": attention.n_kv_heads, "head_dim": attention.head_dim}


def _flat(table: Values, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def _equal(ours: Any, theirs: Any) -> bool:
    """Powers and roots that config.json asks for may differ in the last bit."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return isclose(ours, theirs, rel_tol=1e-12)
    return bool(ours == theirs)


def _in_all(ours: Any, theirs: Any) -> bool:
    """Returns whether they have a bias in all layers in which we have one, and in some."""
    if not isinstance(theirs, list):
        return theirs is True
    return True in theirs and all(their or not our for our, their in zip(_by_layer(ours, theirs), theirs))


def _by_layer(value: Any, like: list[Any]) -> list[Any]:
    return value if isinstance(value, list) else [value] * len(like)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        kinds = list(dict.fromkeys(map(_shown, value)))
        return f"{' or '.join(kinds[:2])} by layer"
    return "none" if value is None else str(value)
