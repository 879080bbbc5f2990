"""A proof compares no trainings in which rounding decides which expert a token takes."""

from typing import Any

import pytest
import torch

from triplane.model.parts.experts import Experts
from triplane.prove import experts, reference
from triplane.prove.reference import SEED, Trace, proof_model, reference_trace


@pytest.mark.parametrize(
    ("options", "scores", "closest"),
    [
        ({"active": 2}, [0.4, 0.3, 0.29, 0.01], 0.01),
        ({"active": 1}, [0.4, 0.3, 0.29, 0.01], 0.1),
        ({"active": 4}, [0.4, 0.3, 0.29, 0.01], float("inf")),
        ({"active": 1, "groups": 2, "group_best": 2}, [0.4, 0.1, 0.3, 0.15], 0.05),  # groups of 0.5 and 0.45
        ({"active": 1, "groups": 2, "group_best": 1}, [0.4, 0.35, 0.3, 0.29], 0.05),  # 0.4 and 0.35 of one group
    ],
    ids=str,
)
def test_the_closest_call_is_found(options: dict[str, Any], scores: list[float], closest: float) -> None:
    config = Experts(n_experts=4, hidden_dim=8, **options)
    clear = [0.9, 0.0, 0.0, -0.9] if options["active"] == 1 else scores  # another token, with no close call
    assert experts._closest(config, torch.tensor([clear, scores])) == pytest.approx(closest, abs=1e-6)


def test_a_seed_with_a_tie_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(_: object, steps: int, seed: int, optimizer: str) -> Trace:
        tie = 0.0 if seed < SEED + 2 else 1e-3
        return Trace(losses=[], norms=[], state={}, tokens_per_s=1.0, seed=seed, closest_call=tie)

    monkeypatch.setattr(reference, "train_plainly", train)
    assert reference_trace(proof_model(), 1).seed == SEED + 2
