"""Imported by every process of a run under fire: tells what it reads, and errs within when a file says so.

Python finds it because the chaos program puts this folder first on PYTHONPATH.
"""

import json
import os
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["CHAOS_FOLDER"])


def armed(name: str) -> bool:
    """True once, to one process, after the file `name` was made."""
    try:
        (FOLDER / "armed" / name).unlink()
    except FileNotFoundError:
        return False
    return True


def plant_faults() -> None:
    from save_phases import PHASES, plant

    for phase in PHASES:
        plant(phase, partial(armed, phase))


def tell_batches_and_spoil_gradients() -> None:
    from triplane.parallel.engine import Engine
    from triplane.training.verdicts import Agreement

    forward_backward, put = Engine.forward_backward, Agreement.put
    read: dict[str, Any] = {}
    lines = open(FOLDER / "batches" / f"{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115 - until the process ends

    def trained(engine: Engine, batches: Any) -> Any:
        seq_len = int(os.environ["CHAOS_SEQ_LEN"])
        rows = [row for batch in batches for row in zip(batch.tokens_T.split(seq_len), batch.targets_T.split(seq_len))]
        dp = engine.mesh.dp
        crcs = [zlib.crc32(targets.numpy(), zlib.crc32(tokens.numpy())) for tokens, targets in rows]
        read.update(dp_rank=dp.rank, dp_size=dp.size, crcs=crcs)
        if not engine.mesh.last_stage or not armed("NaN"):
            return forward_backward(engine, batches)
        norm = engine.local.stages[-1].norm
        assert norm is not None
        hook = norm.register_forward_hook(lambda _, __, out: out.register_hook(lambda x: x * float("nan")) and None)
        loss = forward_backward(engine, batches)
        hook.remove()
        return loss

    def agreed(agreement: Agreement, *, step: int, position: int, **others: Any) -> None:
        lines.write(json.dumps({"time": time.time(), "step": step, "position": position, **read}) + "\n")
        put(agreement, step=step, position=position, **others)

    Engine.forward_backward = trained  # type: ignore[assignment]
    Agreement.put = agreed  # type: ignore[assignment]


def skip(batches: list[list[int]]) -> None:
    """The run begins as one that knows of bad batches."""
    from triplane.launcher import run
    from triplane.training.state import State

    state = State()
    for start, stop in batches:
        state = state.skipping(start, stop - start)
    run.State = type("SkippingState", (), {"__new__": lambda _: state, "load": State.load})  # type: ignore[misc, assignment]


if "RANK" in os.environ or "CHAOS_ALONE" in os.environ:
    plant_faults()
    tell_batches_and_spoil_gradients()
    skip(json.loads(os.environ.get("CHAOS_SKIPPED", "[]")))
