"""Layouts that `triplane prove` trains: every axis alone, in pairs, and together; and large tensors."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any

from triplane.model.config import ModelConfig
from triplane.parallel.config import ParallelConfig
from triplane.parallel.rules import layout_problems
from triplane.prove.networks import OPTIONS, Pair, Row, cover, network, valid_network

_BF16 = {"precision": "bf16"}
_CHOICES: list[list[dict[str, Any]]] = [
    [{"tp": 2}, {"tp": 2, "sequence_parallel": True}],
    [{"pp": 2}, {"pp": 2, "virtual_stages": 2}],
    [{"cp": 2}, {"cp": 2, "cp_method": "ring"}],
    [{"dp": 2}, {"dp": 2, "zero": 0}, {"dp": 2, "zero": 2}, {"dp": 2, "zero": 3}, {"dp": 4, "dp_shard": 2}],
    [{"offload_optimizer": True}],
    [{"recompute": "selective"}, {"recompute": "full"}],
    [{"compile": True}],
    [{"tied": True}],
    [{"optimizer": "muon"}, {"optimizer": "muon by head"}],
    [_BF16],
]
"""Alternatives to the default of each axis: one rank, zero 1, an untied head, fp32."""

_SLOW = [number for number, choices in enumerate(_CHOICES) if choices in ([{"compile": True}], [_BF16])]
"""Axes that are proven with few networks: each compiles anew, or needs a bound of its own."""

_COMMUNICATING: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2, "virtual_stages": 2},
    {"cp": 2},
    {"cp": 2, "cp_method": "ring"},
    {"dp": 2, "zero": 3},
]
"""Choices that each network meets in a quick proof."""

_LARGE: list[dict[str, Any]] = [
    {"tp": 2, "sequence_parallel": True, "pp": 2, "virtual_stages": 2, "dp": 2, "recompute": "selective"},
    {"tp": 2, "sequence_parallel": True, "pp": 2, "dp": 2, "zero": 2, "tied": True, "recompute": "full"},
    {"tp": 2, "cp": 2, "dp": 2, "zero": 3},
    {"tp": 2, "sequence_parallel": True, "pp": 2, "dp": 2, "zero": 3, "tied": True, "recompute": "selective"},
    {"tp": 2, "pp": 2, "virtual_stages": 2, "dp": 2, "zero": 3, "precision": "bf16"},
    {"cp": 2, "cp_method": "ring", "pp": 2, "dp": 2, "zero": 3, "tied": True},
    {"tp": 2, "sequence_parallel": True, "cp": 2, "cp_method": "ring", "dp": 2, "zero": 2, "tied": True},
    {"tp": 2, "cp": 2, "cp_method": "ring", "pp": 2, "tied": True},
    {"cp": 2, "pp": 2, "virtual_stages": 2, "dp": 2, "tied": True},
    {"tp": 2, "pp": 2, "dp": 2, "zero": 0, "tied": True},
    {"tp": 2, "pp": 2, "dp": 2, "tied": True, "precision": "bf16", "offload_optimizer": True},
    {"cp": 2, "cp_method": "ring", "pp": 2, "dp": 2, "zero": 2, "tied": True, "optimizer": "muon"},
    {"tp": 4, "sequence_parallel": True, "pp": 2, "virtual_stages": 2, "tied": True},
    {"tp": 4},
    {"tp": 8, "sequence_parallel": True},
    {"cp": 8, "cp_method": "ring"},
    {"pp": 4, "dp": 2, "zero": 2},
    {"pp": 2, "dp": 4, "dp_shard": 2, "zero": 2, "tied": True},
    {"tp": 2, "dp": 4, "dp_shard": 2, "zero": 2, "optimizer": "muon"},
    {"tp": 2, "sequence_parallel": True, "pp": 2, "dp": 2, "zero": 2, "optimizer": "normuon"},
    {"tp": 2, "cp": 2, "dp": 2, "zero": 3, "optimizer": "normuon"},
    {"tp": 2, "pp": 2, "virtual_stages": 2, "dp": 2, "tied": True, "optimizer": "averaged"},
    {"cp": 2, "pp": 2, "dp": 2, "zero": 3, "optimizer": "averaged"},
    {"cp": 2, "dp": 4, "dp_shard": 4, "precision": "bf16"},
    {"dp": 4, "dp_shard": 2, "zero": 3, "precision": "bf16"},
    {"cp": 2, "pp": 2, "dp": 2, "dp_shard": 2, "zero": 3, "tied": True},
    {"dp": 8, "zero": 3, "recompute": "full", "precision": "bf16"},
    {"tp": 2, "sequence_parallel": True, "pp": 2, "dp": 2, "recompute": ["full", "none", "selective"]},
    {"dp": 2, "compile": True, "recompute": ["selective", "full"]},
]
"""Three axes or more, and one axis over eight ranks."""

_EXPERTS_OVER_RANKS: list[dict[str, Any]] = [
    {"options": (options,), "ep": 2} | layout
    for options, layout in (
        ("experts, one shared", {"dp": 2}),
        ("experts, one shared", {"cp": 2, "cp_method": "ring"}),
        ("experts in groups", {"dp": 2, "tp": 2, "sequence_parallel": True, "recompute": "selective"}),
        ("experts in groups", {"dp": 2, "pp": 2, "zero": 0}),
        ("experts with biases", {"dp": 2, "tp": 2, "recompute": "full"}),
        ("experts with biases", {"dp": 2, "pp": 2, "virtual_stages": 2, "zero": 2}),
        ("experts after a dense layer", {"dp": 4, "ep": 4}),
        ("experts after a dense layer", {"dp": 4, "zero": 2}),
        ("experts, one shared", {"dp": 2, "cp": 2, "tp": 2, "ep": 4}),
        ("experts in groups", {"dp": 2, "tp": 2, "optimizer": "muon"}),
        ("experts, one shared", {"dp": 2, "compile": True}),
        ("experts, one shared", {"dp": 4, "zero": 3}),
        ("experts with biases", {"dp": 4, "dp_shard": 2}),
        ("experts, one shared", {"dp": 2, "precision": "bf16"}),
    )
]
"""Experts over ranks of one axis or more, with each other axis; ranks keep whole or share the optimizer's state."""

_EXPERTS_ON_AXES: list[dict[str, Any]] = [
    {"options": (option,)} | layout
    for option, layout in (
        ("experts, one shared", {"pp": 2, "dp": 2, "ep": 2, "optimizer": "muon"}),
        ("experts in groups", {"tp": 2, "sequence_parallel": True, "pp": 2, "dp": 2, "ep": 2}),
        ("experts in groups", {"tp": 2, "pp": 2, "dp": 2, "ep": 2, "zero": 2, "optimizer": "muon by head"}),
        ("experts in groups", {"tp": 2, "pp": 2, "dp": 2, "zero": 3, "optimizer": "muon"}),
        ("experts in groups", {"tp": 2, "cp": 2, "dp": 2, "zero": 3, "optimizer": "normuon"}),
        ("experts, one shared", {"cp": 2, "dp": 2, "ep": 2, "zero": 2}),
        ("experts with biases", {"tp": 2, "cp": 2, "dp": 2, "optimizer": "muon by head"}),
        ("experts with biases", {"cp": 2, "cp_method": "ring", "pp": 2, "dp": 2, "ep": 4, "optimizer": "muon"}),
        ("experts after a dense layer", {"pp": 2, "virtual_stages": 2, "dp": 4, "ep": 2, "zero": 0}),
        ("experts after a dense layer", {"tp": 2, "cp": 2, "pp": 2, "ep": 2, "tied": True, "optimizer": "muon"}),
        ("experts in groups", {"tp": 2, "dp": 2, "ep": 2, "compile": True}),
        ("experts in groups", {"tp": 2, "sequence_parallel": True, "dp": 2, "ep": 2, "zero": 3, "compile": True}),
        ("experts, one shared", {"dp": 4, "ep": 2, "zero": 3, "compile": True, "recompute": "selective"}),
        ("experts with biases", {"pp": 2, "virtual_stages": 2, "dp": 4, "ep": 2, "zero": 3, "optimizer": "muon"}),
        ("experts in groups", {"tp": 2, "cp": 2, "dp": 2, "ep": 2, "zero": 3, "optimizer": "muon"}),
        ("experts after a dense layer", {"cp": 2, "dp": 2, "ep": 4, "zero": 3, "recompute": "full"}),
        ("experts with biases", {"pp": 2, "dp": 4, "ep": 2, "dp_shard": 2, "optimizer": "muon"}),
        ("experts in groups", {"dp": 8, "ep": 2, "dp_shard": 4, "zero": 2}),
        ("experts, one shared", {"dp": 8, "ep": 2, "dp_shard": 4, "zero": 3}),
        ("experts, one shared", {"dp": 8, "ep": 4, "dp_shard": 2, "zero": 3}),
        ("experts, one shared", {"dp": 4, "ep": 2, "zero": 3, "offload_optimizer": True}),
        ("experts in groups", {"pp": 2, "dp": 4, "ep": 2, "dp_shard": 2, "zero": 2, "offload_optimizer": True}),
    )
]
"""Experts on three axes or more, or compiled, or with ZeRO among some of their ranks."""

_FURTHER = "two tokens further"
_FURTHER_IN_STAGES: list[dict[str, Any]] = [
    {"options": (_FURTHER, *others)} | layout
    for others, layout in (
        ((), {"pp": 2, "virtual_stages": 2, "tied": True}),
        ((), {"tp": 2, "sequence_parallel": True, "pp": 2}),
        (("learned positions", "embedding norm, head bias"), {"pp": 2, "dp": 2, "zero": 3}),
        (
            ("learned positions", "embedding norm, head bias"),
            {"tp": 2, "sequence_parallel": True, "pp": 2, "tied": True},
        ),
        (("experts in groups",), {"pp": 2, "dp": 2, "ep": 2}),
    )
]
"""Modules that predict further in the last stage, which embeds as the first one does."""

LARGE_VOCABULARY = 65_537
_LARGE_TENSORS: list[dict[str, Any]] = [
    {"large": True} | setting
    for setting in (
        {"zero": 0},
        {"dp": 2},
        {"dp": 2, "zero": 0},
        {"dp": 2, "zero": 2},
        {"dp": 2, "zero": 3},
        {"offload_optimizer": True},
        {"tp": 2},
        {"pp": 2, "zero": 0, "tied": True},
    )
]
"""Each way to sum a gradient's norm, over tables of 2 M elements, which expose sums that lose precision with size."""

_TIED: list[dict[str, Any]] = [
    {"zero": 0},
    {"tp": 2, "dp": 2, "zero": 3},
    {"tp": 2, "sequence_parallel": True, "pp": 2, "dp": 2},
    {"pp": 2, "virtual_stages": 2, "dp": 2, "zero": 2},
    {"pp": 2, "virtual_stages": 2, "dp": 2, "zero": 3},
    {"cp": 2, "pp": 2, "zero": 0},
]
_RESHARDED: list[dict[str, Any]] = [
    *_TIED,
    {"dp": 2},
    {"dp": 4, "zero": 2},
    {"dp": 4, "zero": 3, "precision": "bf16"},
    {"dp": 4, "dp_shard": 2},
    {"tp": 4},
    {"cp": 2, "cp_method": "ring", "dp": 2, "zero": 3},
    {"tp": 2, "dp": 2, "precision": "bf16"},
    {"dp": 2, "offload_optimizer": True},
]
_EXPERTS_RESHARDED: list[dict[str, Any]] = [
    {"options": ("experts in groups",)} | layout
    for layout in (
        {"zero": 0},
        {"dp": 2, "ep": 2, "zero": 3},
        {"dp": 4, "ep": 2, "zero": 3},
        {"tp": 2, "dp": 2, "ep": 2, "zero": 3},
        {"dp": 4, "ep": 2, "dp_shard": 2, "zero": 2},
        {"pp": 2, "dp": 4, "ep": 4},
    )
]
"""Each saves a checkpoint that all others load."""

_CASE_DEFAULTS: dict[str, Any] = {
    "tied": False,
    "precision": "fp32",
    "large": False,
    "options": (),
    "optimizer": "adamw",
}
"""Defaults of a case's settings besides the layout."""


@dataclass(frozen=True)
class Case:
    """One row of the proof."""

    layout: ParallelConfig
    tied: bool
    precision: str
    large: bool = False
    """Whether the vocabulary is large."""
    options: tuple[str, ...] = ()
    """Options of the network, of those in networks.py."""
    optimizer: str = "adamw"
    """Of those in reference.py."""

    @property
    def ranks(self) -> int:
        assert isinstance(self.layout.dp, int)
        return self.layout.ranks_of_one * self.layout.dp

    def describe(self) -> str:
        return ", ".join(
            [
                self.layout.describe(),
                *self.options,
                *(["tied"] if self.tied else []),
                *(["large vocabulary"] if self.large else []),
                *([self.optimizer] if self.optimizer != "adamw" else []),
                *([self.precision] if self.precision != "fp32" else []),
            ]
        )

    def model(self, model: ModelConfig) -> ModelConfig:
        """Returns `model` with the options, the head and the vocabulary of this case."""
        size = {"vocab_size": LARGE_VOCABULARY} if self.large else {}
        model = network(model, self.options) if self.options else model
        return model.model_copy(update={"tie_embeddings": self.tied} | size)


RunsHere = Callable[[Case], bool]
"""Whether this machine can run a case that fits the model."""


def full_proof(model: ModelConfig, ranks: int, runs_here: RunsHere) -> list[Case]:
    """Returns every choice alone, every compatible pair of choices, and the large cases."""
    alone = [choice for choices in _CHOICES for choice in choices]
    pairs = [a | b for first, second in combinations(_CHOICES, 2) for a, b in product(first, second)]
    settings = [{}, *alone, *pairs, *_LARGE, *_LARGE_TENSORS]
    cases = [_case(model, setting, ranks=ranks, runs_here=runs_here) for setting in settings]
    return list(dict.fromkeys(case for case in cases if case is not None))


def quick_proof(model: ModelConfig, ranks: int, runs_here: RunsHere) -> list[Case]:
    """Returns a few layouts of many choices each that cover every compatible pair of choices."""
    case_of = partial(_case, model, ranks=ranks, runs_here=runs_here)
    candidates = []
    for picked in product(*([{}, *choices] for choices in _CHOICES)):
        setting = {key: value for choice in picked for key, value in choice.items()}
        case = case_of(setting)
        # Every rank compiles, which is slow; two ranks cover the pairs with compile as well.
        if case is not None and (case.ranks <= 2 or not case.layout.compile):
            chosen = [(axis, json.dumps(choice)) for axis, choice in enumerate(picked) if choice]
            pairs = set(combinations(chosen, 2))
            # bf16 may hide what another pair breaks, so there only its own pairs count.
            bf16 = (len(_CHOICES) - 1, json.dumps(_BF16))
            candidates.append((case, {pair for pair in pairs if bf16 in pair} if bf16 in chosen else pairs))
    missing = set().union(*(pairs for _, pairs in candidates))
    shared_heads = case_of({"tp": 4})  # more ranks than key and value heads
    large = [case_of(setting) for setting in _LARGE_TENSORS]
    cover = [case for case in (shared_heads, *large) if case is not None]
    while missing:
        # Among those that cover the most, the one with the fewest ranks is the quickest.
        case, pairs = max(candidates, key=lambda candidate: (len(candidate[1] & missing), -candidate[0].ranks))
        cover.append(case)
        missing -= pairs
    return cover


def network_proof(model: ModelConfig, ranks: int, runs_here: RunsHere, *, quick: bool) -> list[Case]:
    """Returns networks and layouts that hold every pair of options, and every pair of an option and an axis.

    With `quick` only the latter, of choices that communicate, on at most four ranks.
    """
    parts = {part: list(options) for part, options in OPTIONS.items()}
    spread = {
        f"axis {axis}": [json.dumps(choice) for choice in choices if not quick or choice in _COMMUNICATING]
        for axis, choices in enumerate(_CHOICES)
    }
    slow = {f"axis {axis}" for axis in _SLOW}

    def case(row: Row, ranks: int) -> Case | None:
        setting: dict[str, Any] = {"options": tuple(row[part] for part in parts if part in row)}
        for axis in spread:
            setting |= json.loads(row.get(axis, "{}"))
        if slow & row.keys():  # beside a layout, since one rank compiles and rounds as the reference does
            setting |= {"tp": 2, "sequence_parallel": True}
        return _case(model, setting, ranks=ranks, runs_here=runs_here)

    def covered(axes: set[str], ranks: int, wanted: Callable[[Pair], bool]) -> list[Case]:
        chosen = parts | {axis: options for axis, options in spread.items() if axis in axes and options}
        rows = cover(chosen, lambda row: case(row, ranks) is not None, wanted)
        return [found for row in rows if (found := case(row, ranks)) is not None]

    def one_axis(pair: Pair) -> bool:
        return sum(axis in spread for axis, _ in pair) == 1

    fast = spread.keys() - slow
    ranks = min(ranks, 4) if quick else ranks
    settings = _EXPERTS_OVER_RANKS if quick else [*_EXPERTS_OVER_RANKS, *_EXPERTS_ON_AXES, *_FURTHER_IN_STAGES]
    chosen = [_case(model, setting, ranks=ranks, runs_here=runs_here) for setting in settings]
    on_axes = [case for case in chosen if case is not None]
    if quick:
        return covered(fast, ranks, one_axis) + [case for case in on_axes if case.precision == "fp32"]
    return (
        covered(fast, ranks, lambda _: True)
        + on_axes
        + [found for axis in sorted(slow) for found in covered({axis}, min(ranks, 2), one_axis)]
    )


def resharding_proofs(model: ModelConfig, ranks: int, runs_here: RunsHere) -> Iterator[list[Case]]:
    """Yields layouts of one network and optimizer that store the state differently."""
    for settings, own in (
        (_RESHARDED, {}),
        (_TIED, {"tied": True, "optimizer": "averaged", "options": (_FURTHER,)}),
        (_TIED, {"tied": True, "optimizer": "normuon"}),
        (_EXPERTS_RESHARDED, {}),
    ):
        cases = (_case(model, setting | own, ranks=ranks, runs_here=runs_here) for setting in settings)
        yield [case for case in cases if case is not None]


def own_case(
    model: ModelConfig, layout: ParallelConfig, precision: str, *, ranks: int, runs_here: RunsHere
) -> Case | None:
    """Returns a run's own layout, with at most two ranks on each axis; None if even that does not fit."""
    setting = layout.model_dump(exclude={"dp", "timeout_s"})
    small = {axis: min(2, setting[axis]) for axis in ("tp", "pp", "cp", "ep", "virtual_stages")}
    setting |= small | {"tied": model.tie_embeddings, "precision": "bf16" if precision == "bf16" else "fp32"}
    case_of = partial(_case, model, ranks=ranks, runs_here=runs_here)
    if layout.dp_shard:
        return case_of(setting | {"dp": 4, "dp_shard": 2}) or case_of(setting | {"dp_shard": None})
    return case_of(setting | {"dp": 2}) or case_of(setting)


def _case(model: ModelConfig, setting: dict[str, Any], *, ranks: int, runs_here: RunsHere) -> Case | None:
    """Returns a case; None if the choices do not fit the machine or each other."""
    options = dict(setting)
    own = {key: options.pop(key, default) for key, default in _CASE_DEFAULTS.items()}
    layout = ParallelConfig(**({"dp": 1, "timeout_s": 300.0} | options))
    case = Case(layout, **own)
    if case.ranks > ranks or not valid_network(model, case.options):
        return None
    if list(layout_problems(case.model(model), layout, case.precision)):
        return None
    if case.optimizer != "adamw" and (layout.offload_optimizer or case.precision == "bf16"):
        return None  # rounding is bounded by a bf16 process with AdamW
    return case if runs_here(case) else None
