"""Steps of the engine under many layouts on GPUs that are not there: what runs, and what the host would wait for.

    python tests/cuda/rehearsal.py FOLDER '{"layout": {"tp": 2}}' '{"layout": {"zero": 3}, "packed": true}'

Prints a line of JSON for each case. FOLDER keeps the compiled guard. The engine is the real one, the tensors have no
content: kernels' values, streams, memory and NCCL are not shown.
"""

import json
import multiprocessing
import os
import sys
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / ".src"))

from cuda.absent_gpu import load_guard, pretend

if __name__ == "__main__":
    load_guard(Path(sys.argv[1]))

import torch
import torch.distributed as dist
from cuda import plants
from cuda.recorder import Record, Recorder

_SEQ_LEN, _SEQUENCES, _MICRO_BATCHES = 64, 2, 2
_TIMEOUT_S = 200
RECORD = Record()


def rehearse(case: dict[str, Any]) -> dict[str, Any]:
    """Runs a few steps and returns what the last one did; `error` if one failed."""
    with redirect_stdout(sys.stderr):
        try:
            _run(case)
        except Exception as error:
            traceback.print_exc()
            return {"case": case, "error": f"{type(error).__name__}: {error}"}
    return {
        "case": case,
        "error": "",
        "waits": [[*wait, count] for wait, count in sorted(RECORD.waits.items()) if wait.phase],
        "copies": [[*key, count] for key, count in sorted(RECORD.copies.items()) if key[0]],
        "operators": [[*key, count] for key, count in sorted(RECORD.operators.items()) if key[0]],
        "selected": RECORD.selected,
        "bytes": {phase: count for phase, count in RECORD.bytes.items() if phase},
    }


def _run(case: dict[str, Any]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from triplane.checkpoint.snapshot import Snapshot, last_change
    from triplane.parallel.config import ParallelConfig
    from triplane.parallel.engine import Engine
    from triplane.parallel.groups import connected
    from triplane.parallel.rules import layout_problems
    from triplane.training.hardware import DTYPES
    from triplane.training.optimizers.adamw import AdamW
    from triplane.training.verdicts import Agreement

    layout = ParallelConfig(**({"dp": 1} | case["layout"]))
    precision = case.get("precision", "fp32" if layout.zero == 0 else "bf16")
    model = _model(case)
    assert not (problems := list(layout_problems(model, layout, precision))), problems
    assert isinstance(layout.dp, int)
    ranks = layout.ranks_of_one * layout.dp
    device = torch.device("cuda", 0)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    read = [_batch(case)._map(fake.from_tensor) for _ in range(_MICRO_BATCHES)]
    torch.autograd.set_multithreading_enabled(False)
    with fake, Recorder(RECORD):
        joined = connected(layout, device, rank=case.get("rank", 0), world_size=ranks, store=FakeStore())
        mesh = joined.__enter__()  # to the process's end
        engine = Engine(
            model,
            layout,
            mesh,
            dtype=DTYPES[precision],
            seq_len=_SEQ_LEN,
            optimizer=AdamW(),
        )
        list(engine.fragments())
        engine.optimizer.loaded(step=0)
        if "plant" in case:
            getattr(plants, case["plant"])(engine)
        agreement = Agreement(device)
        for step in range(2):
            last = step == 1
            RECORD.phase = "data" if last else ""
            batches = [batch.pinned().to(device) for batch in read]
            RECORD.phase = "forward_backward" if last else ""
            loss = engine.forward_backward(batches)
            RECORD.phase = "step" if last else ""
            norm = engine.step(1e-4)
            RECORD.phase = "agreement" if last else ""
            agreement.put(step=step, position=0, stop=0, loss=loss, bytes_per_target=1.0, gradient_norm=norm)
            number, position, spelled, _, copied = agreement._pending[-1]
            # Read a step later; a tensor without data has no values.
            values = SimpleNamespace(tolist=lambda: [0.0, 1.0, 1.0, 1.0])
            agreement._pending[-1] = (number, position, spelled, values, copied)  # type: ignore[assignment]
            agreement.take(everything=False)
        RECORD.phase = "snapshot"
        state = list(engine.fragments())
        Snapshot().take(state, last_change(state))


def _model(case: dict[str, Any]) -> Any:
    from triplane.model.config import ModelConfig
    from triplane.model.parts.experts import Experts
    from triplane.model.parts.gated import Gated
    from triplane.model.parts.softmax import Softmax

    return ModelConfig(
        vocab_size=500,
        dim=64,
        n_layers=4,
        attention=Softmax(n_heads=4, n_kv_heads=2, head_dim=16, qkv_bias=case.get("biased", False)),
        feed_forward=Experts(n_experts=8, active=2, hidden_dim=32, shared=1)
        if case.get("experts")
        else Gated(hidden_dim=128),
        tie_embeddings=case.get("tied", False),
    )


def _batch(case: dict[str, Any]) -> Any:
    """A micro-batch with values, on the host: its bounds are read there."""
    from triplane.model.batch import Batch

    tokens = torch.zeros(_SEQUENCES * _SEQ_LEN, dtype=torch.int64)
    cuts = (0, _SEQ_LEN // 3) if case.get("packed") else (0,)
    starts = [start + cut for start in range(0, len(tokens), _SEQ_LEN) for cut in cuts]
    return Batch.build(tokens, tokens, [*starts, len(tokens)])


def _prepare() -> None:
    """Imports all that a rank does, with a GPU and collectives that are not there."""
    pretend(RECORD)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    initialise = dist.init_process_group
    # What is bound to a device would connect to it.
    dist.init_process_group = lambda *args, device_id=None, **kwargs: initialise(*args, **kwargs)
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    from triplane.parallel import engine, groups, megatron, ring, sharded, tensor, ulysses, zero  # noqa: F401
    from triplane.training import hardware, verdicts  # noqa: F401
    from triplane.training.optimizers import adamw  # noqa: F401

    groups._BACKENDS["cuda"] = "cpu:fake,cuda:fake"
    import deepspeed.compile.backend  # noqa: F401  before the cases fork: a second for each


def main() -> None:
    cases = [json.loads(text) for text in sys.argv[2:]]
    with redirect_stdout(sys.stderr):
        _prepare()
    # A process each, since an engine leaves its mark on the libraries; forked, since importing them takes longer.
    with multiprocessing.get_context("fork").Pool(min(2, len(cases)), maxtasksperchild=1) as pool:
        for case, answer in [(case, pool.apply_async(rehearse, (case,))) for case in cases]:
            try:
                print(json.dumps(answer.get(_TIMEOUT_S)), flush=True)
            except multiprocessing.TimeoutError:
                print(json.dumps({"case": case, "error": f"no answer in {_TIMEOUT_S} s"}), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
