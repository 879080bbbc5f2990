"""Faults of ranks: requests to stop, numbers that are not finite, spikes, weights that differ."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_run
from small_corpora import Prepared
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import deterministic
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork

from triplane.checkpoint.folder import latest
from triplane.checkpoint.reader import Checkpoint
from triplane.data.loader import SequenceDataset
from triplane.launcher.run import train_on
from triplane.model.batch import Batch
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine, StepLoss
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import RanksFailedError, run_ranks
from triplane.prove.networks import network
from triplane.prove.reference import SEQUENCES, proof_batch, proof_engine, proof_model
from triplane.storage.errors import TrainingError
from triplane.training.anomaly import anomaly_in
from triplane.training.config import FaultsConfig, RunConfig
from triplane.training.feed import Feed
from triplane.training.hardware import DTYPES
from triplane.training.loop import Trainer
from triplane.training.repetition import repeated
from triplane.training.replicas import differing_ranks
from triplane.training.state import State
from triplane.training.verdicts import Verdict

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"dp": 1, "zero": 0},
    "zero 1": {"dp": 2},
    "zero 2 pp": {"dp": 1, "pp": 2, "zero": 2},
    "zero 3": {"dp": 2, "zero": 3},
    "zero 0 tp": {"dp": 1, "tp": 2, "zero": 0},
    "offload": {"dp": 2, "offload_optimizer": True},
}


def start(config: RunConfig) -> None:
    assert isinstance(config.parallel.dp, int)
    run_ranks(config.parallel, config.parallel.dp * config.parallel.ranks_of_one, _train, config)


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def history(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run_dir) / "history.jsonl").read_text().splitlines()]


def losses(config: RunConfig) -> dict[int, float]:
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(dict(logged)) == len(logged), "a step is there twice"
    return dict(logged)


def final(config: RunConfig) -> Checkpoint:
    newest = latest(Path(config.run_dir) / "checkpoints")
    assert newest is not None
    return Checkpoint(newest)


def on_gradients(engine: Engine, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Changes the gradient of what the last norm or block returns, and with it those of the weights before it."""

    def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
        out.register_hook(change)  # type: ignore[no-untyped-call]

    stage = engine.local.stages[-1]
    *_, last = (module for module in (*stage.blocks.values(), stage.norm) if module is not None)
    return last.register_forward_hook(hook)


def plant(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """On the ranks forked from now on, a gradient is NaN in the calls that `bad` says; counted from 1."""
    forward_backward = Engine.forward_backward
    calls = [0]

    def planted(engine: Engine, batches: list) -> StepLoss:
        calls[0] += 1
        if not bad(calls[0]) or not engine.mesh.last_stage:
            return forward_backward(engine, batches)
        hook = on_gradients(engine, lambda gradient: gradient * float("nan"))
        loss = forward_backward(engine, batches)
        hook.remove()
        return loss

    monkeypatch.setattr(Engine, "forward_backward", planted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_no_number_sends_the_run_back_and_past_its_batch(
    layout: str, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"parallel": LAYOUTS[layout], "optimizer": {"eps": 1e-3}}
    steps = {"steps": 8, "log_every_steps": 4}
    config = small_run(prepared, tmp_path / "run", training=steps, **changes)
    plant(monkeypatch, lambda call: call == 5)
    start(config)
    events = [(event["event"], event["step"]) for event in history(config)]
    assert events == [
        ("start", 0),
        ("save", 3),
        ("rollback", 3),
        ("skip", 3),
        ("save", 6),
        ("save", 8),
        ("completed", 8),
    ]
    assert history(config)[3]["details"] == {"sequences": [32, 40]}
    state = final(config).state
    assert state["consumed_sequences"] == 9 * 8
    assert state["skipped"] == [[32, 40]]
    assert state["tokens_seen"] == 8 * 8 * 32

    # What a run does that never had the batch, whose steps are therefore another's.
    monkeypatch.undo()
    steps_of = Feed.steps

    def without(
        feed: Feed, dataset: SequenceDataset, *, global_batch_size: int, consumed_sequences: int, steps: int
    ) -> Iterator[list[Batch]]:
        size, after = global_batch_size, consumed_sequences + 5 * global_batch_size
        yield from steps_of(
            feed, dataset, global_batch_size=size, consumed_sequences=consumed_sequences, steps=min(steps, 4)
        )
        yield from steps_of(feed, dataset, global_batch_size=size, consumed_sequences=after, steps=steps - 4)

    def replaced(feed: Feed, dataset: SequenceDataset, **of: int) -> Iterator[list[Batch]]:
        return (without if of["steps"] == 8 else steps_of)(feed, dataset, **of)

    monkeypatch.setattr(Feed, "steps", replaced)
    clean = small_run(prepared, tmp_path / "clean", training=steps, **changes)
    start(clean)
    assert losses(config) == losses(clean)
    for key in final(clean).shapes:
        assert torch.equal(final(clean).tensor(key), final(config).tensor(key)), key


def test_it_goes_back_to_the_initial_weights_where_there_is_no_checkpoint(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(prepared, tmp_path / "run", training={"log_every_steps": 8})
    plant(monkeypatch, lambda call: call == 2)
    start(config)
    assert [event["step"] for event in history(config) if event["event"] == "rollback"] == [0]
    assert final(config).state["skipped"] == [[8, 16]]


def test_a_run_that_stays_bad_is_given_up_with_its_checkpoints_good(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(prepared, tmp_path / "run", faults={"max_rollbacks": 2}, parallel={"dp": 2})
    plant(monkeypatch, lambda call: call > 4)
    with pytest.raises(RanksFailedError, match="gradient norm is not finite, after 2 rollbacks") as caught:
        start(config)
    assert str(caught.value).count("after 2 rollbacks") == 2  # both ranks say so
    assert final(config).state["step"] == 3
    assert all(torch.isfinite(final(config).tensor(key)).all() for key in final(config).shapes)


def test_a_spike_is_skipped_alike_by_a_run_that_is_interrupted(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of the corpus has targets that are noise."""
    steps_of = Feed.steps

    def noisy(feed: Feed, dataset: SequenceDataset, **of: int) -> Iterator[list[Batch]]:
        for number, batches in enumerate(steps_of(feed, dataset, **of)):
            position = of["consumed_sequences"] + number * of["global_batch_size"]
            if position == 96 and of["steps"] <= 16:  # not the validation, which begins at 0
                for batch in batches:
                    noise = torch.randint(400, batch.targets_T.shape, generator=torch.Generator().manual_seed(1))
                    batch.targets_T.copy_(noise)
            yield batches

    monkeypatch.setattr(Feed, "steps", noisy)
    changes = {"faults": {"spike_z": 8.0, "spike_window": 8}, "parallel": {"dp": 2}}
    training = {"steps": 16, "log_every_steps": 1, "eval_every_steps": 100}
    whole = small_run(prepared, tmp_path / "whole", training=training, **changes)
    start(whole)
    assert [event["details"] for event in history(whole) if event["event"] == "skip"] == [{"sequences": [96, 104]}]
    for stop in (5, 11, 12, 14, 16):
        cut = small_run(prepared, tmp_path / "cut", training={**training, "stop_at_step": stop}, **changes)
        start(cut)
    assert losses(whole) == losses(cut)
    assert final(whole).state["recent"] == final(cut).state["recent"]
    for key in final(whole).shapes:
        assert torch.equal(final(whole).tensor(key), final(cut).tensor(key)), key


def _update_with_a_nan(mesh: Mesh, layout: ParallelConfig, dtype: torch.dtype) -> tuple[float, bool, bool]:
    """The norm of such a step, whether it left the state alone, and whether the next one changed it."""
    engine = proof_engine(mesh, proof_model(tie_embeddings=False), layout, dtype=dtype)
    share = SEQUENCES // mesh.dp.size
    batches = [proof_batch(engine.config, 0, [mesh.dp.rank * share + i]) for i in range(share)]

    def state() -> list[Tensor]:
        return [fragment.data.clone() for fragment in engine.fragments()]

    engine.forward_backward(batches)
    engine.step(1e-3)
    before = state()
    hook = on_gradients(engine, lambda gradient: gradient * float("nan"))
    engine.forward_backward(batches)
    norm = engine.step(1e-3)
    hook.remove()
    left_alone = all(map(torch.equal, before, state()))
    engine.forward_backward(batches)
    engine.step(1e-3)
    return float(norm), left_alone, not any(map(torch.equal, before, state()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_with_a_nan_changes_nothing(layout: str, precision: str) -> None:
    config = ParallelConfig(**LAYOUTS[layout])
    assert isinstance(config.dp, int)
    ranks = config.dp * config.ranks_of_one
    for norm, left_alone, goes_on in run_ranks(config, ranks, _update_with_a_nan, config, DTYPES[precision]):
        assert not math.isfinite(norm)
        assert left_alone and goes_on


def _flip_a_bit(mesh: Mesh, layout: ParallelConfig, flipped: int) -> list[list[int]]:
    """The ranks that differ, before and after one bit of rank `flipped` was turned over."""
    model = network(proof_model(), ("experts in groups",) if layout.ep > 1 else ())
    engine = proof_engine(mesh, model, layout, dtype=torch.float32)
    before = differing_ranks(engine)
    if mesh.rank == flipped:
        # Of experts if there are any.
        weight = max((placement.parameter.detach() for placement in engine.local.placements), key=Tensor.dim)
        held = weight.to_local() if isinstance(weight, DTensor) else weight
        held.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
    return [before, differing_ranks(engine)]


REPLICAS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "of three": ({"dp": 3, "zero": 0}, [2]),
    "of two": ({"dp": 2, "tp": 2}, [0, 2]),
    "of a shard": ({"dp": 6, "dp_shard": 2, "zero": 3}, [2]),
    "of the same experts": ({"dp": 6, "ep": 2}, [2]),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_a_rank_whose_weights_differ_in_a_bit_is_named(name: str) -> None:
    layout, expected = REPLICAS[name]
    config = ParallelConfig(**layout)
    assert isinstance(config.dp, int)
    for answer in run_ranks(config, config.dp * config.ranks_of_one, _flip_a_bit, config, 2):
        assert answer == [[], expected]


def test_a_run_stops_before_it_saves_weights_that_differ(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def err(engine: Engine, rate: float) -> Tensor:
        norm = step(engine, rate)
        if engine.mesh.rank == 1:
            engine.local.placements[0].parameter.data.view(-1)[0] += 1e-3
        return norm

    monkeypatch.setattr(Engine, "step", err)
    faults = {"compare_replicas_every_steps": 3}
    config = small_run(prepared, tmp_path / "run", faults=faults, parallel={"dp": 2, "zero": 0})
    with pytest.raises(RanksFailedError, match=r"step 3: the weights of ranks \[0, 1\] differ"):
        start(config)
    assert latest(Path(config.run_dir) / "checkpoints") is None


def _step_twice(mesh: Mesh, layout: ParallelConfig, erring: int) -> tuple[str, bool]:
    """Returns the error raised, and whether the state then is that of one step."""
    states, told = [], ""
    for repeat in (False, True):
        engine = proof_engine(mesh, proof_model(), layout, dtype=torch.float32)
        share = SEQUENCES // mesh.dp.size
        batches = [proof_batch(engine.config, 0, [mesh.dp.rank * share + i]) for i in range(share)]
        passes = [0]

        def err(gradient: Tensor, passes: list[int] = passes, before: int = len(batches)) -> Tensor:
            passes[0] += 1
            return gradient * (1 + 1e-3 * (passes[0] == before + 1))  # in the first pass of the second time

        def update(engine: Engine = engine, batches: list = batches) -> None:
            engine.forward_backward(batches)
            engine.step(1e-3)

        if not repeat:
            update()
        else:
            if mesh.rank == erring:
                on_gradients(engine, err)
            try:
                for _ in repeated(engine, 1):
                    update()
            except TrainingError as error:
                told = str(error)
        states.append([fragment.data.clone() for fragment in engine.fragments()])
    return told, all(map(torch.equal, *states))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_done_twice_is_one_step(layout: str) -> None:
    config = ParallelConfig(**LAYOUTS[layout])
    assert isinstance(config.dp, int)
    for told, same in run_ranks(config, config.dp * config.ranks_of_one, _step_twice, config, -1):
        assert told == "" and same


def _kernels_allowed(mesh: Mesh) -> tuple[list[tuple[bool, bool, bool]], tuple[bool, bool, bool]]:
    """Whether torch is deterministic, only warns, and fills new tensors: in both updates, and after."""
    engine = proof_engine(mesh, proof_model(), ParallelConfig(), dtype=torch.float32)
    seen = []

    def look() -> tuple[bool, bool, bool]:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns, deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    def update() -> None:
        seen.append(look())
        engine.forward_backward([proof_batch(engine.config, 0, [0])])
        engine.step(1e-3)

    for _ in repeated(engine, 1):
        update()
    return seen, look()


def test_a_step_is_repeated_with_kernels_that_give_the_same_bits() -> None:
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    ((during, after),) = run_ranks(ParallelConfig(), 1, _kernels_allowed)
    assert during == [(True, False, False)] * 2
    assert after == (False, False, True)


@pytest.mark.parametrize("stage", [0, 1])
def test_arithmetic_that_errs_in_the_repeated_step_is_seen(stage: int) -> None:
    config = ParallelConfig.model_validate({"dp": 2, "zero": stage})
    for told, same in run_ranks(config, 2, _step_twice, config, 1):
        assert "gave two different states on ranks [" in told and not same


def test_a_run_with_repeated_steps_is_the_same_run(prepared: Prepared, tmp_path: Path) -> None:
    ends = []
    for every in (None, 2):
        faults = {"repeat_step_every_steps": every}
        config = small_run(prepared, tmp_path / str(every), faults=faults, parallel={"dp": 2})
        start(config)
        ends.append(final(config))
    for key in ends[0].shapes:
        assert torch.equal(ends[0].tensor(key), ends[1].tensor(key)), key


REQUESTS = {
    "signal": ("SIGUSR1", lambda folder: os.kill(os.getpid(), signal.SIGUSR1)),
    "file": ("stop file", lambda folder: (folder / "stop").touch()),
}


@pytest.mark.parametrize("request_by", REQUESTS)
def test_what_one_rank_is_told_stops_all_after_the_next_step(
    request_by: str, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, ask = REQUESTS[request_by]
    config = small_run(prepared, tmp_path / "run", training={"log_every_steps": 8}, parallel={"dp": 1, "pp": 2})
    step, calls = Engine.step, [0]

    def asked(engine: Engine, rate: float) -> Tensor:
        calls[0] += 1
        if engine.mesh.rank == 1 and calls[0] == 2:  # the first step is logged, and so read at once
            ask(tmp_path / "run")
        return step(engine, rate)

    monkeypatch.setattr(Engine, "step", asked)
    start(config)
    save, told, end = history(config)[-3:]
    assert (save["event"], told["event"], end["event"]) == ("save", "signal", "stopped")
    assert save["step"] == told["step"] == end["step"] == final(config).state["step"]
    # Rank 0 may look for the file before or after rank 1 has made it.
    assert told["step"] == 3 or (request_by == "file" and told["step"] == 4)
    assert told["details"] == {"name": name}
    assert not (tmp_path / "run/stop").exists()


def verdict(loss: float, norm: float) -> Verdict:
    return Verdict(step=1, position=0, stop=0, loss=loss, targets=8, text_bytes=24.0, gradient_norm=norm)


def test_what_is_bad() -> None:
    config = FaultsConfig(spike_z=6, spike_window=8)
    recent = [(3 + 0.1 * (i % 3), 1 + 0.3 * (i % 4)) for i in range(8)]
    assert anomaly_in(verdict(3.1, 1.2), recent, config) is None
    assert anomaly_in(verdict(0.1, 0.01), recent, config) is None
    assert "loss 5 is" in str(anomaly_in(verdict(5, 1.2), recent, config))
    assert "gradient norm 9 is" in str(anomaly_in(verdict(3.1, 9), recent, config))
    assert anomaly_in(verdict(5, 9), recent[1:], config) is None  # too few to know
    assert anomaly_in(verdict(5, 9), recent, FaultsConfig()) is None
    assert anomaly_in(verdict(float("inf"), 1), [], FaultsConfig()) == "loss is not finite"
    flat = [(3.0, 1.0)] * 8
    assert anomaly_in(verdict(3.0001, 1.0), flat, config) is None


def test_positions_that_are_skipped_are_jumped_over() -> None:
    state = State(2, 16, 0).skipping(24, 8).skipping(32, 8)
    assert state.before(8) == state
    state = state.after(8, 1).before(8)
    assert state.consumed_sequences == 40
    assert State(2, 20, 0, skipped=((24, 32),)).before(8).consumed_sequences == 32  # a batch that would overlap
    assert State(2, 16, 0, skipped=((24, 32),)).before(16).consumed_sequences == 32  # a larger one too
    saved = {"step": 3, "consumed_sequences": 40, "tokens_seen": 1, "skipped": [[24, 32]], "run": {}}
    assert State.load(saved) == State(3, 40, 1, ((24, 32),))


def test_a_batch_lies_on_one_side_of_a_change_of_length() -> None:
    """After a skipped batch of another size the change is no longer where a step begins."""
    assert State(5, 56, 0).before(16, [64, 128]).consumed_sequences == 64
    assert State(5, 64, 0).before(64, [64, 128]).consumed_sequences == 64
    assert State(5, 48, 0, skipped=((48, 56),)).before(16, [64, 128]).consumed_sequences == 64
    assert State(5, 56, 0, skipped=((64, 72),)).before(16, [64, 84]).consumed_sequences == 84


def test_skipped_batches_of_a_ramp_are_as_large_as_they_were(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 3 read 4 sequences each, then 8, from sequence 28 on of twice the length.

    The second batch is bad. Without it step 5 would begin at 24; it jumps to 28, and then is bad as well.
    """
    training = {"global_batch_size": 4, "batch_ramp": [{"after_steps": 3, "global_batch_size": 8}]}
    phases = [{"from_sequence": 28, "weights": [1.0], "seq_len": 64}]
    config = small_run(
        prepared,
        tmp_path / "run",
        data={"shuffle_window": 64, "phases": phases},
        training=training,
        checkpoint={"every_steps": 2},
    )
    plant(monkeypatch, lambda call: call in (2, 7))
    start(config)
    skips = [event["details"] for event in history(config) if event["event"] == "skip"]
    assert skips == [{"sequences": [4, 8]}, {"sequences": [28, 36]}]
    state = final(config).state
    assert (state["step"], state["consumed_sequences"]) == (8, 36 + 4 * 8)
    assert state["tokens_seen"] == (3 * 4 + 8) * 32 + 4 * 8 * 64


@pytest.mark.parametrize("name", ["_log", "_compare_replicas", "_sample"])
def test_a_rank_that_hangs_after_a_step_is_found(name: str, prepared: Prepared, tmp_path: Path) -> None:
    def train(mesh: Mesh, config: RunConfig) -> None:
        method = getattr(Trainer, name)
        calls = count(1)

        def hang(*args: object, **named: object) -> object:
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            return method(*args, **named)

        if mesh.rank == 1:
            setattr(Trainer, name, hang)
        train_on(mesh, config)

    config = small_run(
        prepared,
        tmp_path,
        parallel=LAYOUTS["zero 0 tp"],
        training={"sample_every_steps": 1},
        faults={"compare_replicas_every_steps": 1, "hang_timeout_s": 10},
    )
    with pytest.raises(RanksFailedError, match="rank 0: exit code 75"):
        run_ranks(config.parallel, 2, train, config, timeout_s=60)
