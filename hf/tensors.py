"""The tensors of a Hugging Face family and the weights of ours that each holds. Imports no torch.

A tensor holds one weight, joins several, or holds one expert's part of a weight; and may be stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from triplane.model.config import ModelConfig
from triplane.model.describe import model_weights
from triplane.model.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


Join = Literal["rows", "groups", "pairs"]
"""How weights lie along the output axis of a tensor that holds several. `rows`: one after another. `groups`: of
queries, keys and values, for each key head: its query heads, it, its value head (GPT-NeoX, BLOOM, Falcon). `pairs`: a
row of each in turn (gpt-oss)."""


@dataclass(frozen=True)
class Holds:
    """The modules of ours whose weights one module of theirs holds."""

    modules: tuple[str, ...]
    join: Join = "rows"
    transposed: bool = False
    """True: matrices have their input axis first, as GPT-2's."""
    stacked: bool = False
    """True: a tensor holds the matrices of all experts."""
    leaves: tuple[str, str] = (".weight", ".bias")
    """Endings of the names of its tensors: those of a weight and of a bias."""


QKV = ("attention.wq", "attention.wk", "attention.wv")
Modules = Mapping[str, str | Holds]
"""Maps the name of each of their modules to our modules that it holds; where `{}` stands, each expert has one."""


@dataclass(frozen=True)
class Names:
    """Names of a family's modules."""

    ends: Modules
    """Modules outside the layers."""
    layer: Modules
    """Modules of a layer; those whose weights a model lacks, it does not have."""
    layers: str = "model.layers"
    """Stands before the number of a layer."""
    base: str = "model."
    """Stands before all names but the head's; weights saved from a model without a head lack it."""
    buffers: tuple[str, ...] = ()
    """Tensors of a layer that old files hold, and that follow from config.json."""
    others: tuple[str, ...] = ()
    """Prefixes of tensors that do not belong to the text model."""
    states: tuple[tuple[str, str], ...] = ()
    """Tensors of a layer that are neither weight nor bias of a module, and ours."""
    copies: tuple[tuple[str, str], ...] = ()
    """Modules that a layer that predicts further may hold once more, and ours."""
    renamed: tuple[tuple[str, str], ...] = ()
    """How older versions of transformers began names, and how they begin now."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a Hugging Face folder."""

    name: str
    weights: tuple[Weight, ...]
    """Our modules that it holds."""
    join: Join
    transposed: bool
    expert: int | None = None
    """The expert whose part of the weight it holds; None: all of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        if self.expert is not None:
            return self.weights[0].shape[1:]
        shape = list(self.weights[0].shape)
        shape[self._rows] = sum(weight.shape[self._rows] for weight in self.weights)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else tuple(shape)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Returns the tensor that holds these weights."""
        import torch

        if self.expert is not None:
            return parts[0][self.expert]
        if self.join == "groups":
            apart = [part.reshape(*self._heads(w), *part.shape[1:]) for part, w in zip(parts, self.weights)]
            parts = [torch.cat(apart, dim=1).flatten(0, 2)]
        elif self.join == "pairs":
            parts = [torch.stack(parts, dim=self._rows + 1).flatten(self._rows, self._rows + 1)]
        whole = torch.cat(parts, dim=self._rows) if len(parts) > 1 else parts[0]
        return whole.mT if self.transposed else whole

    def part(self, whole: Tensor, number: int) -> Tensor:
        """Returns one of the weights that the tensor holds, or its expert's part of one."""
        import torch

        if self.expert is not None:
            return whole
        whole = whole.mT if self.transposed else whole
        if self.join == "pairs":
            return whole.movedim(self._rows, 0)[number :: len(self.weights)].movedim(0, self._rows)
        if self.join == "groups":
            heads = [self._heads(weight) for weight in self.weights]
            groups, _, width = heads[0]
            apart = whole.reshape(groups, -1, width, *whole.shape[1:])
            return torch.split(apart, [each for _, each, _ in heads], dim=1)[number].flatten(0, 2)
        return torch.split(whole, [weight.shape[self._rows] for weight in self.weights], dim=self._rows)[number]

    @property
    def _rows(self) -> int:
        """The dim along which the tensor joins weights: their output axis."""
        return int(self.weights[0].axes[0].name == "expert")

    def _heads(self, weight: Weight) -> tuple[int, int, int]:
        """Returns groups, heads of each group, width of a head."""
        axis, groups = weight.axes[0], self.weights[-1].axes[0].count
        return groups, axis.count // groups, axis.width


def stored_tensors(names: Names, config: ModelConfig) -> dict[str, Stored]:
    """Returns every tensor of the model by the family's name; all weights of `config` must have a place."""
    weights = model_weights(config)
    found = list(_stored(names.ends, weights, ours="", theirs=""))
    for number in range(config.n_blocks):
        found += _stored(names.layer, weights, ours=f"blocks.{number}.", theirs=f"{names.layers}.{number}.")
        for theirs, ours in names.states:
            if weight := weights.get(f"blocks.{number}.{ours}"):
                found.append(Stored(f"{names.layers}.{number}.{theirs}", (weight,), "rows", transposed=False))
    placed = {weight.name for stored in found for weight in stored.weights}
    assert placed == weights.keys(), f"{sorted(weights.keys() - placed)} have no place"
    return {stored.name: stored for stored in found}


def _stored(modules: Modules, weights: Mapping[str, Weight], *, ours: str, theirs: str) -> Iterator[Stored]:
    for name, held in modules.items():
        holds = Holds((held,)) if isinstance(held, str) else held
        for leaf, end in zip(("weight", "bias"), holds.leaves):
            held_weights = [weights.get(f"{ours}{module}.{leaf}") for module in holds.modules]
            parts = tuple(weight for weight in held_weights if weight is not None)
            if parts and (holds.stacked or "{}" in name) == (parts[0].axes[0].name == "expert"):
                assert len(parts) == len(held_weights), f"{name}{end}: some of {holds.modules} have none"
                transposed = holds.transposed and parts[0].role == "matrix"
                experts = range(parts[0].shape[0]) if "{}" in name else [None]
                for expert in experts:
                    theirs_one = f"{theirs}{name.format(expert)}{end}"
                    yield Stored(theirs_one, parts, holds.join, transposed=transposed, expert=expert)
