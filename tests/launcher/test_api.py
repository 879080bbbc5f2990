"""A trained model in Python: what the commands say, and a loss as torch computes it."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from commands import triplane as command
from runs import small_run
from small_corpora import Prepared
from torch.nn import functional as F

import triplane
from triplane.launcher.api import LoadedModel
from triplane.launcher.run import train_on
from triplane.model.batch import Batch
from triplane.parallel import zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.storage.errors import CheckpointError, ModelError
from triplane.training.config import RunConfig


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


@pytest.fixture(scope="module")
def run_dir(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_run(prepared, tmp_path_factory.mktemp("api") / "run")
    run_ranks(config.parallel, 1, _train, config)
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> LoadedModel:
    return triplane.load(run_dir)


def test_it_generates_what_the_command_does(loaded: LoadedModel, run_dir: Path) -> None:
    said = command("generate", run_dir, "--prompt", "1: a", "--tokens", 8, "--seed", 3, cwd=run_dir).stdout
    assert "1: a" + loaded.generate("1: a", tokens=8, seed=3) + "\n" == said
    assert "".join(loaded.stream("1: a", tokens=8, seed=3)) == loaded.generate("1: a", tokens=8, seed=3)


def test_the_loss_of_a_text_is_its_cross_entropy(loaded: LoadedModel, prepared: Prepared) -> None:
    text = "x=1 Straße " * 20
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
    context, nats = loaded.context, 0.0
    assert len(ids) > 2 * context
    for start in range(0, len(ids) - 1, context):
        part, targets = ids[start : start + context], ids[start + 1 : start + 1 + context]
        with torch.no_grad():
            scores_TV = loaded.model.logits(Batch.padded(part, 1))
        nats += float(F.cross_entropy(scores_TV[: len(targets)], torch.tensor(targets), reduction="sum"))
    loss = loaded.loss(text)
    assert loss.nats == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert loss.tokens * loss.bytes_per_token == pytest.approx(len(text.encode()))
    with pytest.raises(ModelError, match="no tokens"):
        loaded.loss("")


def test_what_is_no_checkpoint_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        triplane.load(tmp_path)


def test_the_package_is_light_and_names_its_version() -> None:
    code = "import sys, triplane; print(triplane.__version__, 'torch' in sys.modules, hasattr(triplane, 'lode'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"{version('triplane')} False False\n"
