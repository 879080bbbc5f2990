"""Trains the proof's model on a layout, from a checkpoint of another if one is given."""

from pathlib import Path

import torch

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.location import Location
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore
from triplane.model.config import ModelConfig
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.training.proof import Trace, proof_engine, train_on_mesh

LAYOUTS = {
    "one": (ParallelConfig(zero=0), 1),
    "zero1": (ParallelConfig(), 1),
    "dp2": (ParallelConfig(zero=0), 2),
    "zero1 dp2": (ParallelConfig(), 2),
    "zero2 dp2": (ParallelConfig(zero=2), 2),
    "zero3 dp2": (ParallelConfig(zero=3), 2),
    "tp2": (ParallelConfig(tp=2, zero=0), 2),
    "tp2 sp dp2": (ParallelConfig(tp=2, sequence_parallel=True), 4),
    "zero3 tp2 dp2": (ParallelConfig(tp=2, zero=3), 4),
    "pp2": (ParallelConfig(pp=2, zero=0), 2),
    "pp2 v2 dp2": (ParallelConfig(pp=2, virtual_stages=2), 4),
    "tp2 pp2": (ParallelConfig(tp=2, pp=2, zero=0), 4),
    "zero1 tp2 pp2": (ParallelConfig(tp=2, pp=2), 4),
    "tp4": (ParallelConfig(tp=4), 4),
    "cp2 zero2 dp2": (ParallelConfig(cp=2, zero=2), 4),
}


def train(
    mesh: Mesh,
    config: ModelConfig,
    layout: ParallelConfig,
    steps: range,
    load: Path | None = None,
    save: Location | None = None,
) -> Trace:
    """Runs `steps` on this rank, from the checkpoint `load` or from initial weights; writes one under `save`."""
    engine = proof_engine(mesh, config, layout, torch.float32)
    if load is not None:
        Checkpoint(load).fill(engine.optimizer.fragments())
        engine.optimizer.loaded(steps.start)
    trace = train_on_mesh(engine, steps)
    if save is not None:
        store = CheckpointStore(save, CheckpointConfig(keep_last=100))
        store.save(steps.stop, engine.optimizer.fragments(), {})
        (saved,) = store.ended(wait=True)
        assert saved.error is None, saved.error
    return trace
