"""Traits of a Hugging Face family: what config.json and our config both say, each in its own words.

A trait reads its keys of config.json into tables of the model's values, and writes them from there. Imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveFloat

from triplane.storage.errors import ModelError

Hf = dict[str, Any]
"""A config.json: checked, absent keys filled in."""
Values = dict[str, Any]
"""Tables as in the config; `layers` holds one of changes for each layer."""

Size = Annotated[int, Field(gt=0, le=2**20)]
"""Largest size of a dim. The bound keeps the bytes of any weight within 64 bits."""
Vocabulary = Annotated[int, Field(gt=0, le=2**24)]
Required = ...
"""Stands for the default of a key that has none."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
    "linear": "none",
}
"""Transformers' names of activations, and ours."""


class Trait:
    """A property of the model that some keys of config.json state."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        """Type and default of each key of config.json that it reads."""
        return {}

    @property
    def aliases(self) -> dict[str, str]:
        """Other names of its keys."""
        return {}

    def read(self, hf: Hf, model: Values) -> None:
        """Adds to the model's values what the keys say; raises ModelError if the model cannot do it."""

    def write(self, model: Values, hf: Hf) -> None:
        """Adds its keys to config.json, as near to the model as they can express."""


def put(model: Values, path: str, value: Any) -> None:
    """Sets a value of a table; passes over a table that is absent, such as that of a norm that there is not."""
    *tables, key = path.split(".")
    node: Any = model
    for table in tables:
        node = node.get(table)
        if node is None:
            return
    node[key] = value


def get(model: Values, path: str) -> Any:
    """Returns a value of a table; None if there is none."""
    node: Any = model
    for key in path.split("."):
        if not isinstance(node, dict):
            return None
        node = node.get(key)
    return node


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key(Trait):
    """One key of config.json, for one or several values of ours; for none if all that matters is its own value."""

    name: str
    type: Any
    paths: tuple[str, ...]
    default: Any
    """A value, or what computes one from the other keys. Where a null is allowed, also for that."""
    decode: Callable[[Any], Any]
    encode: Callable[[Any], Any]
    also: tuple[str, ...]

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {self.name: (self.type, None if callable(self.default) else self.default)}

    @property
    def aliases(self) -> dict[str, str]:
        return dict.fromkeys(self.also, self.name)

    def read(self, hf: Hf, model: Values) -> None:
        if hf[self.name] is None and callable(self.default):
            hf[self.name] = self.default(hf)
        value = self.decode(hf[self.name])
        for path in self.paths:
            put(model, path, value)

    def write(self, model: Values, hf: Hf) -> None:
        value = self.encode(get(model, self.paths[0])) if self.paths else None
        nullable = bool(self.paths) and type(None) in get_args(self.type)
        if value is None and (not nullable or callable(self.default)):
            value = self.default(hf) if callable(self.default) else self.default
        hf[self.name] = value


def key(
    name: str,
    *paths: str,
    type: Any = Size,
    default: Any = Required,
    decode: Callable[[Any], Any] = _same,
    encode: Callable[[Any], Any] = _same,
    also: tuple[str, ...] = (),
) -> Key:
    """Returns the trait of one key."""
    return Key(name, type, paths, default=default, decode=decode, encode=encode, also=also)


def must_be(name: str, value: bool) -> Key:
    """Returns the trait of a key that has one value in all models that we can compute."""
    literal: Any = Literal
    return key(name, type=literal[value] | None, default=value)


def switch(name: str, *paths: str, default: bool) -> Key:
    """Returns the trait of a key that is true or false; null is false."""
    return key(name, *paths, type=bool | None, default=default, decode=bool, encode=bool)


def number(name: str, *paths: str, default: Any = Required) -> Key:
    """Returns the trait of a key that is a number over 0."""
    return key(name, *paths, type=PositiveFloat, default=default)


def activation(name: str, default: str) -> Key:
    """Returns the trait of the activation of the feed-forward part."""
    literal: Any = Literal
    named = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return key(
        name,
        "feed_forward.activation",
        type=literal[tuple(ACTIVATIONS)],
        default=default,
        decode=ACTIVATIONS.__getitem__,
        encode=lambda ours: ours and named[ours],
    )


@dataclass(frozen=True)
class Optional(Trait):
    """A key that is true if the model has a part, such as a norm of queries and keys."""

    name: str
    path: str
    part: Callable[[], Any]
    default: bool = False

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {self.name: (bool | None, self.default)}

    def read(self, hf: Hf, model: Values) -> None:
        put(model, self.path, self.part() if hf[self.name] else None)

    def write(self, model: Values, hf: Hf) -> None:
        hf[self.name] = get(model, self.path) is not None


@dataclass(frozen=True)
class Choice(Trait):
    """Keys whose values together choose one of several tables of the model's values."""

    choices: dict[tuple[Any, ...], Values]
    """Values of the keys, and the value of each of our paths that they choose."""
    names: tuple[str, ...]
    defaults: tuple[Any, ...]

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {name: (bool | None, default) for name, default in zip(self.names, self.defaults)}

    def read(self, hf: Hf, model: Values) -> None:
        found = tuple(bool(hf[name]) for name in self.names)
        if found not in self.choices:
            told = ", ".join(f"{name} {value}" for name, value in zip(self.names, found))
            raise ModelError(f"{told}: this model has no such block")
        for path, value in self.choices[found].items():
            put(model, path, value)

    def write(self, model: Values, hf: Hf) -> None:
        fits = (keys for keys, wanted in self.choices.items() if all(get(model, p) == v for p, v in wanted.items()))
        hf.update(zip(self.names, next(fits, self.defaults)))


@dataclass(frozen=True)
class Heads(Trait):
    """Numbers of heads, and their width."""

    heads: str = "num_attention_heads"
    also: tuple[str, ...] = ()
    kv_heads: str | None = "num_key_value_heads"
    """None: as many as query heads."""
    kv_default: int | None = None
    """None: as many as query heads."""
    width: str | None = None
    """The key of `head_dim`. None: dim / n_heads."""
    width_default: int | None = None
    divides: bool = False
    """True: transformers refuses a width that is not a multiple of the heads although heads have a width of theirs."""
    dim: str = "hidden_size"

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        keys: dict[str, tuple[Any, Any]] = {self.heads: (Size, Required)}
        if self.kv_heads:
            keys[self.kv_heads] = (Size | None, self.kv_default)
        if self.width:
            keys[self.width] = (Size | None, self.width_default)
        return keys

    @property
    def aliases(self) -> dict[str, str]:
        return dict.fromkeys(self.also, self.heads)

    def read(self, hf: Hf, model: Values) -> None:
        heads, dim = hf[self.heads], hf[self.dim]
        if dim % heads and (self.divides or self.width is None):
            raise ModelError(f"{self.dim} ({dim}) is not a multiple of {self.heads} ({heads})")
        shared = (hf[self.kv_heads] if self.kv_heads else None) or heads
        if heads % shared:
            raise ModelError(f"{self.heads} ({heads}) is not a multiple of {self.kv_heads} ({shared})")
        width = (hf[self.width] if self.width else None) or max(1, dim // heads)
        model["attention"] |= {"n_heads": heads, "n_kv_heads": shared, "head_dim": width}

    def write(self, model: Values, hf: Hf) -> None:
        attention = model["attention"]
        hf[self.heads] = attention["n_heads"]
        if self.kv_heads:
            hf[self.kv_heads] = attention["n_kv_heads"]
        if self.width:
            hf[self.width] = attention["head_dim"]
