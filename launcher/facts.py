"""The facts that a start records for the report: machine, versions, model and corpus."""

import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from triplane.data.baseline import unigram_loss
from triplane.data.opening import Sources
from triplane.model.count import count_parameters
from triplane.slurm.snapshot import commit_of_code
from triplane.training.config import RunConfig

_UNIGRAM_TOKENS = 1 << 22
"""Read of each split, for a start must not wait for a whole corpus."""


def facts(config: RunConfig, sources: Sources, device: torch.device) -> dict[str, Any]:
    """Returns the facts by name, as details of the event `start` or `resume`."""
    commit = commit_of_code()
    weights = [weights for _, weights, _ in config.data.timeline()]
    counted = [number for number in range(len(config.data.sources)) if any(each[number] > 0 for each in weights)]
    train, validation = ([corpora[number] for number in counted] for corpora in (sources.train, sources.validation))
    return {
        "device": _device_name(device),
        "host": socket.gethostname(),
        "versions": f"{_own_version()}torch {torch.__version__}, Python {platform.python_version()}",
        **({"commit": commit} if commit else {}),
        "parameters": count_parameters(config.model),
        "corpus_tokens": sum(corpus.tokens for corpus in train),
        "unigram_loss": unigram_loss(train, validation, most_tokens=_UNIGRAM_TOKENS),
    }


def _own_version() -> str:
    try:
        return f"triplane {version('triplane')}, "
    except PackageNotFoundError:  # its code stands beside its dependencies, as in a container
        return ""


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
