"""Rotary positions in config.json, as transformers 5 spells them, and as 4 and most others do. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from triplane.hf.traits import Hf, Trait, Values
from triplane.storage.errors import ModelError


class RopeTable(BaseModel, strict=True, frozen=True, allow_inf_nan=False, extra="allow"):
    """`rope_parameters`, as transformers 5 writes it, or `rope_scaling`, as 4 does."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: PositiveFloat | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    attention_factor: PositiveFloat | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    truncate: bool = True

    @property
    def nested(self) -> dict[str, Any]:
        """Tables for kinds of layers."""
        return {key: value for key, value in (self.model_extra or {}).items() if isinstance(value, dict)}


@dataclass(frozen=True)
class Rope(Trait):
    """Rotary positions, the same in all layers."""

    theta: float = 10_000.0
    """Default of the base."""
    fraction: float | None = None
    """Default share of a head's dims that turn. None: all turn, whatever the config says."""
    interleaved: bool = False
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn")
    theta_key: str = "rope_theta"
    fraction_key: str = "partial_rotary_factor"
    absent: Values | None = None
    """The scaling where config.json has no table of rope parameters."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        turning = Annotated[float, Field(gt=0, le=1) if self.fraction else Field(ge=1, le=1)]
        return {
            self.theta_key: (PositiveFloat | None, None),
            self.fraction_key: (turning | None, None),
            "rope_parameters": (RopeTable | None, None),
            "rope_scaling": (RopeTable | None, None),
            "original_max_position_embeddings": (PositiveInt | None, None),
        }

    def read(self, hf: Hf, model: Values) -> None:
        table = found(hf)
        if table.nested:
            kind = next(iter(table.nested))
            raise ModelError(f"rope parameters of its own for {kind[:60]!r}; this family has the same in every layer")
        model["positions"] = self.positions(hf, table, hf[self.theta_key] or self.theta)

    def positions(self, hf: Hf, table: RopeTable, theta: float) -> Values:
        """Returns our positions of a table of rope parameters."""
        turning = table.partial_rotary_factor or hf[self.fraction_key] or self.fraction or 1.0
        if self.fraction is None and turning != 1:
            raise ModelError(f"partial_rotary_factor is {turning}; in this family all dims of a head turn")
        return {
            "kind": "rotary",
            "base": table.rope_theta or theta,
            "fraction": turning,
            "interleaved": self.interleaved,
            "scaling": self._scaling(hf, table) if hf["rope_parameters"] or hf["rope_scaling"] else self.absent,
        }

    def _scaling(self, hf: Hf, table: RopeTable) -> Values | None:
        kind = table.rope_type or table.type or "default"
        if kind == "default":
            return None
        if kind not in self.scalings:
            raise ModelError(f"rope_type is {kind[:60]!r}; this family has {', '.join(('default', *self.scalings))}")
        original = hf["original_max_position_embeddings"] or table.original_max_position_embeddings
        original = original or hf["max_position_embeddings"]
        needed: dict[str, Any] = {"factor": table.factor}
        if kind == "yarn" and table.factor is None:
            needed["factor"] = max(1.0, hf["max_position_embeddings"] / original)
        if kind == "llama3":
            needed |= {"low_freq_factor": table.low_freq_factor, "high_freq_factor": table.high_freq_factor}
        if absent := [key for key, value in needed.items() if value is None]:
            raise ModelError(f"rope_type is {kind!r}, but there is no {absent[0]}")
        if kind == "llama3" and needed["low_freq_factor"] >= needed["high_freq_factor"]:
            raise ModelError(
                f"low_freq_factor ({needed['low_freq_factor']}) is not below high_freq_factor "
                f"({needed['high_freq_factor']})"
            )
        if needed["factor"] == 1:
            if kind == "yarn" and _magnitude(table, 1.0) != 1:
                raise ModelError(
                    "rope_type is 'yarn' with factor 1 and an attention_factor; this model has no such thing"
                )
            return None
        if kind == "yarn":
            return _yarn(table, original=original, factor=needed["factor"])
        return {"kind": kind} | needed | ({"original_seq_len": original} if kind == "llama3" else {})

    def write(self, model: Values, hf: Hf) -> None:
        positions = self.turning(model["positions"])
        hf["rope_parameters"] = self.table(positions)
        hf[self.theta_key] = positions["base"]
        hf["rope_scaling"] = scaling_of(positions)
        if self.fraction:
            hf[self.fraction_key] = positions["fraction"]

    def turning(self, positions: Values) -> Values:
        """Returns the values of rotary positions; of others, those that the family has by default."""
        plain = {"base": self.theta, "scaling": None, "fraction": self.fraction or 1.0}
        return positions if positions["kind"] == "rotary" else plain

    def table(self, positions: Values) -> Values:
        """Returns `rope_parameters`."""
        turning = {"partial_rotary_factor": positions["fraction"]} if self.fraction else {}
        return {"rope_type": "default", "rope_theta": positions["base"], **turning, **(scaling_of(positions) or {})}


@dataclass(frozen=True)
class AlphaRope(Rope):
    """With a fixed `alpha`, the scaling "dynamic" is another base (Hunyuan)."""

    def read(self, hf: Hf, model: Values) -> None:
        table = found(hf)
        alpha = (table.model_extra or {}).get("alpha")
        if table.rope_type == "dynamic" or table.type == "dynamic":
            if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise ModelError(f"rope_type is 'dynamic' and its alpha {alpha!r}; this family has a number over 0")
            width = model["attention"]["head_dim"]
            base = (table.rope_theta or hf[self.theta_key] or self.theta) * alpha ** (width / (width - 2))
            plain = RopeTable(rope_theta=base)
            model["positions"] = self.positions(hf, plain, base)
        else:
            super().read(hf, model)


def found(hf: Hf) -> RopeTable:
    """Returns the form that transformers reads, if both are present."""
    empty = RopeTable()
    return (
        next((rope for rope in (hf["rope_scaling"], hf["rope_parameters"]) if rope not in (None, empty)), None) or empty
    )


def scaling_of(positions: Values) -> Values | None:
    """Returns `rope_scaling`."""
    scaling = positions["scaling"]
    if scaling is None:
        return None
    names = {"kind": "rope_type", "original_seq_len": "original_max_position_embeddings"}
    return {names.get(key, key): value for key, value in scaling.items() if value is not None}


def _yarn(table: RopeTable, *, original: int, factor: float) -> Values:
    magnitude = _magnitude(table, factor)
    plain = 0.1 * math.log(factor) + 1
    return {
        "kind": "yarn",
        "factor": factor,
        "original_seq_len": original,
        "beta_fast": table.beta_fast or 32.0,
        "beta_slow": table.beta_slow or 1.0,
        "attention_factor": None if magnitude == plain else magnitude,
        "truncate": table.truncate,
    }


def _magnitude(table: RopeTable, factor: float) -> float:
    """Returns what cosines and sines are multiplied by, as transformers computes it."""

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if table.attention_factor is not None:
        return table.attention_factor
    return of(table.mscale) / of(table.mscale_all_dim) if table.mscale and table.mscale_all_dim else of(1.0)
