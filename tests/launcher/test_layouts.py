"""Which layouts are proven: all features alone, in pairs and together."""

from itertools import combinations, product
from pathlib import Path

import pytest

from triplane.config.load import load_config
from triplane.prove.cases import Case, full_proof, network_proof, own_case, quick_proof
from triplane.prove.command import _shrunken
from triplane.prove.networks import OPTIONS, valid_network
from triplane.prove.reference import proof_model

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = proof_model()


def everywhere(_: Case) -> bool:
    return True


def features(case: Case) -> set[str]:
    """Returns the features of a case besides the defaults."""
    layout = case.layout
    tensor = "tensor + sequence" if layout.sequence_parallel else "tensor"
    pipeline = "pipeline of virtual stages" if layout.virtual_stages > 1 else "pipeline"
    present = {
        tensor: layout.tp > 1,
        pipeline: layout.pp > 1,
        layout.cp_method: layout.cp > 1,
        f"zero {layout.zero}": layout.dp != 1,
        "offload": layout.offload_optimizer,
        f"recompute {layout.recompute}": layout.recompute in ("selective", "full"),  # a list mixes these
        "compile": layout.compile,
        "tied": case.tied,
        case.precision: case.precision != "fp32",
    }
    return {name for name, there in present.items() if there}


def pairs(cases: list[Case]) -> set[tuple[str, str]]:
    return {pair for case in cases for pair in combinations(sorted(features(case)), 2)}


def axes(case: Case) -> int:
    layout = case.layout
    sizes = (layout.tp, layout.pp, layout.cp, layout.dp)
    return sum(size != 1 for size in sizes) + layout.sequence_parallel + (layout.virtual_stages > 1)


def test_the_full_proof_has_every_feature_alone_in_pairs_and_six_of_three_axes() -> None:
    cases = full_proof(MODEL, 8, everywhere)
    assert len(cases) == len(set(cases))
    alone = {next(iter(found)) for case in cases if len(found := features(case)) == 1}
    assert alone == set().union(*(features(case) for case in cases))
    assert sum(axes(case) >= 3 for case in cases) >= 6
    assert all(case.ranks <= 8 for case in cases)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_quick_proof_has_the_pairs_of_the_full_one_in_few_layouts(ranks: int) -> None:
    full, quick = full_proof(MODEL, ranks, everywhere), quick_proof(MODEL, ranks, everywhere)
    assert pairs(quick) >= pairs([case for case in full if axes(case) <= 2])
    assert len(quick) < len(full) / 2


def test_what_bf16_would_hide_is_proven_in_fp32() -> None:
    fp32 = [case for case in quick_proof(MODEL, 8, everywhere) if case.precision == "fp32"]
    assert pairs(fp32) >= {pair for pair in pairs(full_proof(MODEL, 8, everywhere)) if "bf16" not in pair}


def test_what_the_machine_cannot_run_is_left_out_and_its_pairs_are_not_missed() -> None:
    quick = quick_proof(MODEL, 4, lambda case: not case.layout.compile)
    assert quick
    assert not any(case.layout.compile for case in quick)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", "dp 2, zero 1"),
        ("qwen3-0.6b", "dp 2, zero 1, compile, tied, bf16"),
        ("8b", "tp 2 + sequence x dp 2, zero 1, recompute selective, compile, bf16"),
        ("70b", "tp 2 + sequence x pp 2 x 2 stages x dp 2, zero 1, recompute selective, compile, bf16"),
        ("deepseek-v3", "pp 2 x dp 2 x ep 2, zero 1, recompute full, bf16"),
    ],
)
def test_a_runs_own_layout_comes_with_two_ranks_on_each_axis(name: str, expected: str) -> None:
    run = load_config(CONFIGS / f"{name}.toml")
    own = own_case(_shrunken(run.model), run.parallel, run.training.precision, ranks=8, runs_here=everywhere)
    assert own is not None
    assert own.describe() == expected


def test_every_pair_of_options_and_every_option_with_every_axis_is_proven() -> None:
    cases = network_proof(MODEL, 8, everywhere, quick=False)
    proven = {
        pair for case in cases for pair in combinations(sorted([*case.options, *(features(case) - {"zero 1"})]), 2)
    }
    names = {name: part for part, options in OPTIONS.items() for name in options}
    for one, other in combinations(sorted(names), 2):
        if names[one] != names[other] and valid_network(MODEL, (one, other)):
            assert (one, other) in proven
    features_to_meet = ["tensor", "tensor + sequence", "pipeline", "ring", "ulysses", "zero 3"]
    for option, feature in product(names, features_to_meet):
        assert tuple(sorted((option, feature))) in proven
    assert sum(axes(case) >= 3 for case in cases) >= 25


def test_the_quick_proof_has_every_option_with_every_kind_of_communication() -> None:
    cases = network_proof(MODEL, 8, everywhere, quick=True)
    assert all(case.ranks <= 4 for case in cases)
    found = {(option, feature) for case in cases for option in case.options for feature in features(case)}
    options = {option for option, _ in found}
    assert options == {name for named in OPTIONS.values() for name in named}
    kinds = ["tensor", "tensor + sequence", "pipeline of virtual stages", "ring", "ulysses", "zero 3"]
    assert found >= set(product(options, kinds))
