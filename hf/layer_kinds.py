"""Layers of two kinds in config.json: with and without a window, or rotary positions. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from triplane.hf.rope import Rope, RopeTable
from triplane.hf.traits import Hf, Trait, Values
from triplane.storage.errors import ModelError
from triplane.storage.foreign import first_problem

SLIDING, FULL = "sliding_attention", "full_attention"
NO_POSITIONS = {"kind": "none"}
Kinds = list[Literal["sliding_attention", "full_attention"]]


def every(period: int, key: str | None = None) -> Callable[[Hf], list[str]]:
    """Returns the default of families in which every so many-th layer is full; config.json may say how many."""

    def kinds(hf: Hf) -> list[str]:
        n = (hf[key] if key else None) or period
        return [FULL if number % n == 0 else SLIDING for number in range(1, hf["num_hidden_layers"] + 1)]

    return kinds


def windows_of(model: Values) -> list[int]:
    """Returns the windows of the layers that have one."""
    return [layer["attention"]["window"] for layer in model["layers"] if layer["attention"].get("window")]


@dataclass(frozen=True)
class Windows(Trait):
    """A window in some layers, by `layer_types`."""

    default: Callable[[Hf], list[str]]
    """The kinds of layers where config.json does not list them."""
    window: int | None = 4096
    """Default of `sliding_window`."""
    period: str | None = None
    """The key for the number of layers after which a full one comes."""
    full_turns: Literal["always", "without_windows", "never"] = "always"
    """When full layers have positions; `without_windows`: if `sliding_window` is null."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        own: dict[str, tuple[Any, Any]] = {self.period: (NonNegativeInt | None, None)} if self.period else {}
        return own | {"layer_types": (Kinds | None, None), "sliding_window": (PositiveInt | None, self.window)}

    def read(self, hf: Hf, model: Values) -> None:
        kinds = hf["layer_types"] or self.default(hf)
        if len(kinds) != hf["num_hidden_layers"]:
            raise ModelError(f"layer_types lists {len(kinds)} layers, num_hidden_layers is {hf['num_hidden_layers']}")
        window = hf["sliding_window"]
        if window is None and SLIDING in kinds:
            raise ModelError("layers have sliding windows, but sliding_window is null")
        turns = self.full_turns == "always" or (self.full_turns == "without_windows" and window is None)
        for layer, kind in zip(model["layers"], kinds):
            layer["attention"]["window"] = window if kind == SLIDING else None
            if kind == FULL and not turns:
                layer["positions"] = NO_POSITIONS

    def write(self, model: Values, hf: Hf) -> None:
        layers, windows = model["layers"], windows_of(model)
        # A window that hides nothing within the context is none of ours, but tells the layers apart.
        mixed = any(layer["positions"] == NO_POSITIONS for layer in layers)
        usual = NO_POSITIONS if mixed or self.full_turns == "never" else model["positions"]
        sliding = [layer["attention"]["window"] or layer["positions"] not in (usual, NO_POSITIONS) for layer in layers]
        hf["layer_types"] = [SLIDING if has else FULL for has in sliding]
        hf["sliding_window"] = max(windows, default=hf["max_position_embeddings"] if any(sliding) else None)


@dataclass(frozen=True)
class SwitchedWindows(Windows):
    """A window if `use_sliding_window` says so, in the layers from `max_window_layers` on (Qwen2)."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return super().keys | {"use_sliding_window": (bool | None, False), "max_window_layers": (int, 28)}

    def read(self, hf: Hf, model: Values) -> None:
        if not hf["use_sliding_window"]:
            hf["sliding_window"] = None
        super().read(hf, model)

    def write(self, model: Values, hf: Hf) -> None:
        super().write(model, hf)
        hf["use_sliding_window"] = hf["sliding_window"] is not None
        hf["max_window_layers"] = next((n for n, kind in enumerate(hf["layer_types"]) if kind == SLIDING), 28)


def upper_layers(hf: Hf) -> list[str]:
    """Returns the kinds of layers of Qwen2."""
    first = hf["max_window_layers"] if hf["sliding_window"] else hf["num_hidden_layers"]
    return [SLIDING if number >= first else FULL for number in range(hf["num_hidden_layers"])]


def all_layers(hf: Hf) -> list[str]:
    """Returns the kinds of layers of a family in which all have a window, or none."""
    return [SLIDING if hf["sliding_window"] else FULL] * hf["num_hidden_layers"]


def first_of(period: int) -> Callable[[Hf], list[str]]:
    """Returns the default of families in which the first of so many layers is full (CWM)."""
    return lambda hf: [FULL if number % period == 0 else SLIDING for number in range(hf["num_hidden_layers"])]


@dataclass(frozen=True)
class NoRopeLayers(Trait):
    """Layers without positions, where `no_rope_layers` says 0 (SmolLM3); only such have a window by default."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {
            "no_rope_layers": (list[Literal[0, 1]] | None, None),
            "no_rope_layer_interval": (PositiveInt, 4),
            "use_sliding_window": (bool | None, False),
            "sliding_window": (PositiveInt | None, None),
            "layer_types": (Kinds | None, None),
        }

    def read(self, hf: Hf, model: Values) -> None:
        layers, interval = model["layers"], hf["no_rope_layer_interval"]
        turns = hf["no_rope_layers"] or [int(number % interval != 0) for number in range(1, len(layers) + 1)]
        window = hf["sliding_window"] if hf["use_sliding_window"] else None
        kinds = hf["layer_types"] or [SLIDING if window and not turning else FULL for turning in turns]
        for name, listed in (("no_rope_layers", turns), ("layer_types", kinds)):
            if len(listed) != len(layers):
                raise ModelError(f"{name} lists {len(listed)} layers, but num_hidden_layers is {len(layers)}")
        if SLIDING in kinds and window is None:
            raise ModelError("layers have sliding windows, but sliding_window is null or switched off")
        for layer, turning, kind in zip(layers, turns, kinds):
            layer["attention"]["window"] = window if kind == SLIDING else None
            if not turning:
                layer["positions"] = NO_POSITIONS

    def write(self, model: Values, hf: Hf) -> None:
        layers = model["layers"]
        hf["no_rope_layers"] = [int(layer["positions"] != NO_POSITIONS) for layer in layers]
        hf["layer_types"] = [SLIDING if layer["attention"]["window"] else FULL for layer in layers]
        hf["sliding_window"] = max(windows_of(model), default=None)
        hf["use_sliding_window"] = hf["sliding_window"] is not None


@dataclass(frozen=True)
class RopeByKind(Rope):
    """Rotary positions of full layers, and others of layers with a window; stands after `Windows`."""

    local_theta: float = 10_000.0
    """Default of the base of layers with a window."""
    local_key: str | None = None
    """Older files' key for it."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        own: dict[str, tuple[Any, Any]] = {self.local_key: (PositiveFloat | None, None)} if self.local_key else {}
        return super().keys | own

    def read(self, hf: Hf, model: Values) -> None:
        new, old = hf["rope_parameters"] or RopeTable(), hf["rope_scaling"]
        if not new.nested and new != RopeTable():
            raise ModelError(f"rope_parameters holds no {FULL}; this family has a table for each kind of layer")
        own = {kind: new.nested.get(kind) or {} for kind in (SLIDING, FULL)}
        if old is not None:
            own[FULL] = own[FULL] | old.model_dump(exclude_unset=True)
        full, sliding = (_table(kind, own[kind]) for kind in (FULL, SLIDING))
        model["positions"] = self.positions(hf, full, hf[self.theta_key] or self.theta)
        base = (hf[self.local_key] if self.local_key else None) or self.local_theta
        local = self.positions(hf, sliding, base)
        for layer in model["layers"]:
            if layer["attention"]["window"] is not None:
                layer["positions"] = local

    def write(self, model: Values, hf: Hf) -> None:
        super().write(model, hf)
        pairs = zip(model["layers"], hf["layer_types"])
        local = next((layer["positions"] for layer, kind in pairs if kind == SLIDING), None)
        local = {"base": self.local_theta, "scaling": None} if local is None else self.turning(local)
        hf["rope_parameters"] = {FULL: hf["rope_parameters"], SLIDING: self.table(local)}
        if self.local_key:
            hf[self.local_key] = local["base"]


def _table(kind: str, content: Values) -> RopeTable:
    try:
        return RopeTable.model_validate(content)
    except ValidationError as error:
        raise ModelError(f"rope_parameters.{kind}.{first_problem(error)}") from None
