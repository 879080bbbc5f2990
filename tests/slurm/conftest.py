"""One cluster for most tests here, and the folder from which a user submits."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.cluster import PROGRAMS, Cluster, until
from slurm.submitted import with_config
from small_corpora import Prepared


@pytest.fixture(scope="session")
def has_slurm() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing; .ci/slurm installs them as root, by apt")


@pytest.fixture(scope="session")
def started_cluster(has_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    """With an empty queue."""
    yield started_cluster
    started_cluster.output("scancel", "--user=root")
    until(lambda: started_cluster.output("squeue", "--noheader") == "", "the queue is empty")


@pytest.fixture
def folder(prepared: Prepared, tmp_path: Path) -> Path:
    """From where one submits, with a config `long.toml`."""
    return with_config(tmp_path, prepared)
