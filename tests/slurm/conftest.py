"""One cluster for most tests here, and the folder from which a user submits."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import small_run
from slurm.cluster import PROGRAMS, Cluster
from small_corpora import Prepared

from triplane.launcher.toml import to_toml


@pytest.fixture(scope="session")
def has_slurm() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing; .ci/slurm installs them as root, by apt")


@pytest.fixture(scope="session")
def cluster(has_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def folder(prepared: Prepared, tmp_path: Path) -> Path:
    """With a config `long.toml` of a run that does not end by itself, saved every 20 steps."""
    config = small_run(
        prepared,
        Path("run"),
        parallel={"tp": 2, "dp": "auto"},
        schedule={"kind": "constant"},
        training={"steps": 1_000_000, "eval_every_steps": 1_000_000},
        checkpoint={"every_steps": 20},
    )
    (tmp_path / "long.toml").write_text(to_toml(config))
    return tmp_path
