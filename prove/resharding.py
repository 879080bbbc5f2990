"""Trains the proof's model from a checkpoint to a checkpoint, each of any layout."""

import torch

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore
from triplane.model.config import ModelConfig
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.prove.reference import Trace, proof_engine, train_on_mesh
from triplane.storage.location import Location


def train_between(
    mesh: Mesh,
    config: ModelConfig,
    layout: ParallelConfig,
    *,
    dtype: torch.dtype,
    optimizer: str = "adamw",
    steps: range,
    load: Location | None = None,
    save: Location | None = None,
) -> Trace:
    """Trains `steps` on this rank, from the checkpoint `load` or from initial weights, and saves one under `save`.

    Raises OSError if the save fails.
    """
    engine = proof_engine(mesh, config, layout, dtype=dtype, optimizer=optimizer)
    if load is not None:
        Checkpoint(load).fill(engine.fragments())
        engine.optimizer.loaded(steps.start)
    trace = train_on_mesh(engine, steps)
    if save is not None:
        store = CheckpointStore(save, CheckpointConfig(keep_last=100))
        state = {"step": steps.stop, "consumed_sequences": 0, "tokens_seen": 0, "run": {}}
        store.save(steps.stop, engine.fragments(), state)
        (saved,) = store.ended(wait=True)
        if saved.error:
            raise OSError(saved.error)
    return trace
