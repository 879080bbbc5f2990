"""One thread a process: tests run many ranks on few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # megatron-core compiles small functions, 18 s a run

import pytest
import torch
from small_corpora import Prepared, build_corpus

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return build_corpus(tmp_path_factory.mktemp("corpus"))
