"""Layers without experts among layers with them, as config.json tells them apart. Imports no torch."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from triplane.hf.traits import ACTIVATIONS, Hf, Size, Trait, Values


@dataclass(frozen=True)
class DenseLayers(Trait):
    """Some layers have a gated part of width `intermediate_size`; stands before the traits of experts."""

    width: int
    """Default of that width."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {"intermediate_size": (Size, self.width)}

    def read(self, hf: Hf, model: Values) -> None:
        dense = {"kind": "gated", "hidden_dim": hf["intermediate_size"], "activation": ACTIVATIONS[hf["hidden_act"]]}
        numbers = self.dense(hf)
        for number, layer in enumerate(model["layers"]):
            if number in numbers:
                layer["feed_forward"] = dense

    def write(self, model: Values, hf: Hf) -> None:
        parts = [layer["feed_forward"] for layer in model["layers"]]
        numbers = [number for number, part in enumerate(parts) if part["kind"] == "gated"]
        hf["intermediate_size"] = parts[numbers[0]]["hidden_dim"] if numbers else self.width
        hf |= self.listed(numbers, len(parts))
        model["feed_forward"] = next((part for part in parts if part["kind"] != "gated"), parts[0])

    def dense(self, hf: Hf) -> Collection[int]:
        """Returns the numbers of the layers without experts."""
        raise NotImplementedError

    def listed(self, numbers: list[int], n_layers: int) -> Hf:
        """Returns the keys that say which layers have no experts."""
        raise NotImplementedError


@dataclass(frozen=True)
class FirstDense(DenseLayers):
    """The first layers (DeepSeek)."""

    count: int
    """Default of `first_k_dense_replace`."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return super().keys | {"first_k_dense_replace": (NonNegativeInt, self.count)}

    def dense(self, hf: Hf) -> Collection[int]:
        return range(hf["first_k_dense_replace"])

    def listed(self, numbers: list[int], n_layers: int) -> Hf:
        return {"first_k_dense_replace": next((n for n in range(n_layers) if n not in numbers), n_layers)}


@dataclass(frozen=True)
class ListedDense(DenseLayers):
    """Those in `mlp_only_layers`, and all but every `decoder_sparse_step`-th (Qwen)."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        own = {"mlp_only_layers": (list[NonNegativeInt] | None, None), "decoder_sparse_step": (PositiveInt, 1)}
        return super().keys | own

    def dense(self, hf: Hf) -> Collection[int]:
        step = hf["decoder_sparse_step"]
        skipped = (number for number in range(hf["num_hidden_layers"]) if (number + 1) % step)
        return {*(hf["mlp_only_layers"] or ()), *skipped}

    def listed(self, numbers: list[int], n_layers: int) -> Hf:
        return {"mlp_only_layers": numbers, "decoder_sparse_step": 1}
