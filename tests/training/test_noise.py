"""The gradient noise scale: the same in every layout, without a trace in what is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_run
from small_corpora import Prepared

from triplane.config.checks import check
from triplane.launcher.run import train_on
from triplane.model.batch import IGNORED_TARGET
from triplane.model.init import initial_weight
from triplane.model.transformer import Transformer
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.prove.reference import SEED, proof_batch, proof_engine, proof_model
from triplane.training.config import RunConfig
from triplane.training.noise import GradientNorm, averaged, noise_metrics, norm_of_half

SEQUENCES, MICRO = 8, 2
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dp": 2, "zero": 2},
    {"dp": 2, "zero": 3},
    {"dp": 2, "offload_optimizer": True},
    {"pp": 2, "virtual_stages": 2},
    {"tp": 2, "sequence_parallel": True},
    {"cp": 2, "cp_method": "ring"},
]


def _plain() -> GradientNorm:
    """Returns the norm of the gradient over sequences 0, 2, 4 and so on by autograd alone."""
    model = Transformer(proof_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            zeros, sizes = (0,) * parameter.dim(), tuple(parameter.shape)
            weight = initial_weight(model.config, SEED, name, shape=parameter.shape, offsets=zeros, sizes=sizes)
            parameter.copy_(weight)
    batch = proof_batch(model.config, 0, range(0, SEQUENCES, 2))
    tokens = (batch.targets_T != IGNORED_TARGET).sum()
    (model(batch).objective / tokens).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return GradientNorm(sum(float(gradient.double().square().sum()) for gradient in gradients), int(tokens))


def _of_half(mesh: Mesh, layout: ParallelConfig) -> tuple[GradientNorm, bool]:
    """Returns the norm, and whether the state stayed as it was and a step follows as ever."""
    engine, dp = proof_engine(mesh, proof_model(), layout, dtype=torch.float32), mesh.dp
    starts = range(dp.rank, SEQUENCES, dp.size * MICRO)
    rows = [range(start, start + dp.size * MICRO, dp.size) for start in starts]
    batches = [proof_batch(engine.config, 0, numbers) for numbers in rows]
    before = [fragment.data.clone() for fragment in engine.fragments()]
    half = norm_of_half(engine, batches)
    unchanged = all(map(torch.equal, before, (fragment.data for fragment in engine.fragments())))
    again = norm_of_half(engine, batches)
    engine.forward_backward(batches)
    engine.step(1e-3)
    return half, unchanged and again == half


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_every_layout_measures_half_of_the_batch(axes: dict[str, Any]) -> None:
    layout, plain = ParallelConfig(**{"dp": 1} | axes), _plain()
    assert isinstance(layout.dp, int)
    for half, unchanged in run_ranks(layout, layout.dp * layout.ranks_of_one, _of_half, layout):
        assert half.tokens == plain.tokens
        assert half.squared == pytest.approx(plain.squared, rel=1e-5)
        assert unchanged


def test_two_batches_give_noise_and_signal() -> None:
    signal, noise = 3.0, 5000.0  # of a gradient, and of the gradient of one token
    half, whole = (GradientNorm(signal + noise / tokens, tokens) for tokens in (400, 1000))
    found = averaged((0.0, 0.0), half, whole)
    assert noise_metrics(found)["noise_scale"] == pytest.approx(noise / signal)
    assert noise_metrics(averaged(found, half, whole))["noise_scale"] == pytest.approx(noise / signal)


def test_an_estimate_without_a_sign_is_not_reported() -> None:
    found = averaged((0.0, 0.0), GradientNorm(11.0, 100), GradientNorm(1.0, 1000))  # |G|^2 is below zero
    assert found[1] < 0 and noise_metrics(found) == {}
    assert noise_metrics((0.0, 0.0)) == {}
    assert averaged(found, GradientNorm(1.0, 1000), GradientNorm(1.0, 1000)) == found  # half is padding


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def test_a_run_records_it_and_is_the_same_run(prepared: Prepared, tmp_path: Path) -> None:
    def entries(name: str, **training: Any) -> list[dict[str, float]]:
        config = small_run(prepared, tmp_path / name, training=training)
        run_ranks(config.parallel, 1, _train, config)
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    usual, measured = entries("usual"), entries("measured", noise_scale_every_steps=2)
    losses = [[entry["loss"] for entry in run if "loss" in entry] for run in (usual, measured)]
    assert losses[0] == losses[1]
    assert not any("noise_scale" in entry for entry in usual)
    assert any(entry.get("noise_scale", 0.0) > 0 for entry in measured)
    entries("stopped", noise_scale_every_steps=2, stop_at_step=5)
    resumed = entries("stopped", noise_scale_every_steps=2)
    scales = [[entry["noise_scale"] for entry in run if "noise_scale" in entry] for run in (measured, resumed)]
    assert scales[0] == scales[1]


def test_one_sequence_has_no_half(prepared: Prepared, tmp_path: Path) -> None:
    training = {"global_batch_size": 1, "micro_batch_size": 1, "noise_scale_every_steps": 4}
    config = small_run(prepared, tmp_path / "run", training=training)
    assert check(config, ranks=1) == [
        "noise_scale_every_steps compares half a batch with a whole one, but global_batch_size is 1"
    ]
