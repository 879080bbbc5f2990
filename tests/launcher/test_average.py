"""The average of a run's weights, and the mean of its checkpoints: right values, measured, sampled and exported."""

import json
from pathlib import Path

import pytest
import torch
from commands import triplane
from runs import small_run
from safetensors.torch import load_file
from small_corpora import Prepared
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork

from triplane.checkpoint.reader import Checkpoint
from triplane.launcher.run import train_on
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.training.config import RunConfig


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


@pytest.fixture(scope="module")
def folder(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `run`, which saved after steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("average")
    config = small_run(
        prepared,
        folder / "run",
        optimizer={"average_decay": 0.9},
        checkpoint={"every_steps": 2, "keep_last": 4},
    )
    run_ranks(config.parallel, 1, _train, config)
    return folder


def test_the_mean_is_that_of_the_last_checkpoints(folder: Path) -> None:
    said = triplane("average", "run", "mean", "--last", 3, cwd=folder)
    assert (said.returncode, said.stdout) == (0, "mean: mean of steps 4, 6, 8\n"), said.stderr
    mean = Checkpoint(folder / "mean")
    each = [Checkpoint(folder / f"run/checkpoints/step_{step}") for step in (4, 6, 8)]
    assert set(mean.shapes) == {key for key in each[0].shapes if key.startswith("weight/")}
    for key in mean.shapes:
        expected = torch.stack([checkpoint.tensor(key).double() for checkpoint in each]).mean(0)
        torch.testing.assert_close(mean.tensor(key), expected.float())
    assert "mean of steps 4, 6, 8" in triplane("inspect", "mean", "--verify", cwd=folder).stdout
    assert triplane("generate", "mean", "--tokens", 4, cwd=folder).returncode == 0
    earlier = triplane("average", "run/checkpoints/step_6", "earlier", "--last", 2, cwd=folder)
    assert earlier.stdout == "earlier: mean of steps 4, 6\n"
    config = (folder / "run" / "config.toml").read_text()
    (folder / "next.toml").write_text(config)
    started = triplane("train", "next.toml", "run_dir=next", "checkpoint.initial=mean", "training.steps=4", cwd=folder)
    assert "starting from mean" in started.stdout, started.stderr


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (("average", "run", "more", "--last", 5), "but the run has 4 until there (step 2, 4, 6, 8); take fewer"),
        (("average", "run", "run", "--last", 2), "run exists"),
        (("generate", "one", "--average"), "one/checkpoints/step_1: holds no average of the weights"),
    ],
    ids=str,
)
def test_what_is_not_there_is_said_in_one_line(
    arguments: tuple[object, ...], refused: str, folder: Path, prepared: Prepared
) -> None:
    if "one" in arguments:
        config = small_run(prepared, folder / "one", training={"stop_at_step": 1})
        run_ranks(config.parallel, 1, _train, config)
    said = triplane(*arguments, cwd=folder)
    assert said.returncode == 2 and refused in said.stderr and said.stderr.count("\n") == 1, said.stderr
    assert not (folder / "more").exists()


def test_the_average_is_measured_as_in_the_run_and_exported(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (_, logged) = (line["validation_average_loss"] for line in lines if "validation_average_loss" in line)
    said = triplane("evaluate", "run", "--sequences", 16, "--average", cwd=folder)
    assert f"validation loss {logged:.4f} nats" in said.stdout, said.stdout + said.stderr
    weights = triplane("evaluate", "run", "--sequences", 16, cwd=folder)
    assert weights.stdout != said.stdout
    exported = triplane("export", "run", "exported", "--average", "--dtype", "fp32", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    tensors = load_file(folder / "exported" / "model.safetensors")
    checkpoint = Checkpoint(folder / "run/checkpoints/step_8")
    assert tensors["model.embed_tokens.weight"].equal(checkpoint.tensor("average/embedding.weight"))
    assert not tensors["model.embed_tokens.weight"].equal(checkpoint.tensor("weight/embedding.weight"))
    assert "exponential average" in (folder / "exported" / "README.md").read_text()
