"""A run config small enough to train in a second, and a run folder that another process holds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from small_corpora import Prepared

from triplane.storage.locks import locked_folder
from triplane.training.config import RunConfig


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """Within, a process that does nothing else holds the lock of `folder`."""
    (ready, told), (waits, ends) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(ends)
        with locked_folder(folder, wait=False):
            os.write(told, b".")
            os.read(waits, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield
    finally:
        os.write(ends, b".")
        os.waitpid(child, 0)
        for end in (ready, told, waits, ends):
            os.close(end)


def small_run(prepared: Prepared, run_dir: Path, **changes: Any) -> RunConfig:
    """Eight steps on the small corpus; `changes` are tables merged over the tables of the same name."""
    tables: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": prepared.tokenizer.vocab_size,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "head_dim": 8,
            "hidden_dim": 64,
        },
        "data": {"sources": [{"corpus": str(prepared.folder)}], "seq_len": 32},
        "parallel": {"dp": 1},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "training": {
            "steps": 8,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "log_every_steps": 1,
            "eval_every_steps": 4,
            "eval_sequences": 16,
        },
        "checkpoint": {"every_steps": 3, "keep_last": 2},
        "faults": {},
        "profile": {},
    }
    merged = {name: table | changes.pop(name, {}) for name, table in tables.items()}
    assert not changes, f"unknown tables {changes.keys()}"
    if "feed_forward" in merged["model"]:
        del merged["model"]["hidden_dim"]  # is in that table
    return RunConfig.model_validate({"run_dir": str(run_dir), "seed": 5, **merged})
