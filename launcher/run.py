"""Runs one rank: builds the parts from the config and passes them to the trainer."""

import os
import socket
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from triplane.checkpoint.folder import fresh_start_problem, newest_manifest, newest_step
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.resume import Damage, Resumed, fill_from_newest
from triplane.checkpoint.store import CheckpointStore
from triplane.config.preflight import (
    change_since,
    checkpoints_folder,
    config_of,
    find_checkpoint,
    flatten,
    own_id,
    parent_of,
    run_record,
)
from triplane.config.toml import to_toml
from triplane.data.opening import open_sources
from triplane.launcher.facts import facts
from triplane.launcher.monitor.report import report_problem
from triplane.parallel.devices import gpu_number, threads
from triplane.parallel.engine import Engine
from triplane.parallel.groups import connected
from triplane.parallel.mesh import Mesh
from triplane.parallel.rank_0 import on_rank_0
from triplane.parallel.ranks import Rank
from triplane.storage.errors import CheckpointError
from triplane.storage.files import write_whole
from triplane.storage.location import Location
from triplane.training.callback import Run
from triplane.training.callbacks import load_callbacks
from triplane.training.config import RunConfig
from triplane.training.corpora import Corpora
from triplane.training.failure import Story, failure_of, lost_peers
from triplane.training.feed import Feed
from triplane.training.hardware import (
    DTYPES,
    Precision,
    faster_precision,
    newest_flash_attention,
    peak_flops_per_s,
)
from triplane.training.loop import Trainer
from triplane.training.report import Report
from triplane.training.run_log import record_event
from triplane.training.state import State
from triplane.training.stopping import LAUNCHER
from triplane.training.stopwatch import Stopwatch
from triplane.training.watchdog import Watchdog

_START_S = 1800.0
"""Minimum time limit, in seconds, of starting, which may read a large checkpoint, and of ending."""


def run_rank(config: RunConfig, rank: Rank, allow_fresh_start: bool) -> None:
    """Connects to the other ranks and trains."""
    run_dir, folder = Path(config.run_dir), checkpoints_folder(config)
    story = Story(
        run_dir,
        rank=rank.rank,
        world_size=rank.world_size,
        watched=LAUNCHER in os.environ,
        newest_step=lambda: newest_step(folder),
    )
    try:
        device = _take_device(rank)
        with connected(config.parallel, device, rank=rank.rank, world_size=rank.world_size) as mesh:
            hosts = [""] * rank.world_size
            dist.all_gather_object(hosts, socket.gethostname())
            story.hosts = hosts
            train_on(mesh, config, local_ranks=rank.local_size, allow_fresh_start=allow_fresh_start, story=story)
    except Exception as error:
        story.tell(failure_of(rank.rank, error), aftermath=lost_peers(error))
        raise


def train_on(
    mesh: Mesh,
    config: RunConfig,
    *,
    local_ranks: int = 1,
    allow_fresh_start: bool = False,
    story: Story | None = None,
) -> None:
    """Trains from the newest intact checkpoint in the run folder, or from initial weights."""
    story = story or Story(
        Path(config.run_dir), rank=mesh.rank, world_size=mesh.world_size, watched=True, newest_step=lambda: 0
    )
    with Watchdog(
        config.faults.hang_timeout_s,
        rank=mesh.rank,
        stopwatch=Stopwatch(mesh.device),
        tell=story.tell,
        compiled=config.parallel.compile,
    ) as watchdog:
        with watchdog.work("start", 0, at_least_s=_START_S):
            trainer, state = _prepare(
                mesh, config, local_ranks=local_ranks, allow_fresh_start=allow_fresh_start, watchdog=watchdog
            )
        state = trainer.run(state)
        with watchdog.work("end", state.step, at_least_s=_START_S):
            if state.step < config.training.steps:
                trainer.report.event(state.step, "stopped", steps_left=config.training.steps - state.step)
            else:
                trainer.report.event(state.step, "completed")
                on_rank_0(lambda: _write_done(config))
            on_rank_0(lambda: _write_report(Path(config.run_dir), trainer.report))
            trainer.report.close(state.step)


def _prepare(
    mesh: Mesh, config: RunConfig, *, local_ranks: int, allow_fresh_start: bool, watchdog: Watchdog
) -> tuple[Trainer, State]:
    """Builds the parts of a run, and loads the newest checkpoint. Collective."""
    folder = checkpoints_folder(config)
    config = _resolve(config, folder, mesh)
    dtype = DTYPES[config.training.precision]
    flash = newest_flash_attention(mesh.device)
    engine = Engine(
        config.model,
        config.parallel,
        mesh,
        dtype=dtype,
        seq_len=config.data.seq_len,
        optimizer=config.optimizer,
    )
    state, resumed, set_aside = _restore(engine, config, folder, allow_fresh_start=allow_fresh_start)
    sources = open_sources(config.data, config.folder.corpora)
    own: dict[str, Any] = {"id": on_rank_0(lambda: own_id(config)), "parent": _parent(config, resumed)}
    record = run_record(config, sources) | own
    corpora = Corpora.of(config, sources)
    if resumed is not None:
        on_rank_0(lambda: _record_change(config, resumed, record))
    choices = flatten(config.model_dump(exclude_none=True))
    run = Run(
        config=config,
        toml=to_toml(config),
        choices={key: str(choice) if isinstance(choice, list | tuple) else choice for key, choice in choices.items()},
        id=own["id"],
        step=state.step,
    )
    callbacks = load_callbacks(config.tracking)
    known = facts(config, sources, mesh.device) if mesh.rank == 0 else {}
    report = Report(run, mesh.rank, callbacks)
    if flash is not None:
        report.message(flash)
    for line in set_aside:
        report.message(line)
    report.event(
        state.step,
        "resume" if resumed else "start",
        layout=config.parallel.describe(),
        ranks=mesh.world_size,
        precision=config.training.precision,
        **known,
    )
    _announce(report, config, resumed, mesh)
    trainer = Trainer(
        config=config,
        engine=engine,
        corpora=corpora,
        feed=Feed(
            micro_batch_size=config.training.micro_batch_size,
            num_workers=config.data.num_workers,
            local_ranks=local_ranks,
            dp=mesh.dp,
            device=mesh.device,
        ),
        store=CheckpointStore(folder, config.checkpoint, sources.tokenizer),
        restore=lambda: _restore(engine, config, folder, allow_fresh_start=allow_fresh_start)[0],
        run_record=record,
        report=report,
        watchdog=watchdog,
        callbacks=callbacks,
        peak_flops_per_s=peak_flops_per_s(mesh.device, dtype),
    )
    on_rank_0(lambda: None)  # the others wait here, within the limit of a start, while rank 0 connects to trackers
    return trainer, state


def _take_device(rank: Rank) -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(threads(os.environ) or torch.get_num_threads())
        return torch.device("cpu")
    number = gpu_number(rank, torch.cuda.device_count())
    assert number is not None, "checked before"
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _resolve(config: RunConfig, folder: Location, mesh: Mesh) -> RunConfig:
    """Replaces `auto` by what it comes to here; a resumed run keeps its precision."""
    precision = config.training.precision
    if precision == "auto":
        precision = on_rank_0(lambda: _saved_precision(folder) or faster_precision(mesh.device))
    training = config.training.model_copy(update={"precision": precision})
    parallel = config.parallel.model_copy(update={"dp": mesh.dp.size})
    resolved = config.model_copy(update={"training": training, "parallel": parallel})
    on_rank_0(lambda: _write_config(resolved))
    return resolved


def _write_config(config: RunConfig) -> None:
    run = config.folder
    run.path.mkdir(parents=True, exist_ok=True)
    run.done.unlink(missing_ok=True)
    write_whole(run.config, to_toml(config).encode())


def _write_done(config: RunConfig) -> None:
    write_whole(config.folder.done, f"{config.training.steps}\n".encode())


def _write_report(run_dir: Path, report: Report) -> None:
    if problem := report_problem(run_dir):  # no reason to fail: the checkpoint is saved
        report.message(f"no report: {problem}")


def _saved_precision(folder: Location) -> Precision | None:
    newest = newest_manifest(folder)
    return cast(Precision, config_of(newest[1].state["run"], newest[0]).training.precision) if newest else None


def _restore(
    engine: Engine, config: RunConfig, folder: Location, *, allow_fresh_start: bool
) -> tuple[State, Resumed | None, list[str]]:
    """Loads the newest intact checkpoint, or starts over; returns a line on each one set aside too. Collective."""
    resumed, damages = fill_from_newest(folder, engine.fragments())
    on_rank_0(lambda: _record_damages(config, damages))
    set_aside = [f"{damage.reason}; set aside as {damage.path}" for damage in damages]
    if resumed is None and not allow_fresh_start and (problem := on_rank_0(lambda: fresh_start_problem(folder))):
        raise CheckpointError("\n".join([*set_aside, problem]))
    return _begin(engine, resumed, config), resumed, set_aside


def _begin(engine: Engine, resumed: Resumed | None, config: RunConfig) -> State:
    """Returns the state of the checkpoint that was loaded, or initializes the weights and returns the first state."""
    if resumed is not None:
        saved = resumed.state
        engine.optimizer.loaded(saved["step"])
        return State.load(saved)
    initial = config.checkpoint.initial
    if initial is None:
        engine.initialize(config.seed)
        return State()
    weights = (fragment for fragment in engine.fragments() if fragment.kind == "weight")
    Checkpoint(find_checkpoint(initial)).fill(weights)
    engine.optimizer.loaded(step=0)
    return State()


def _parent(config: RunConfig, resumed: Resumed | None) -> dict[str, Any] | None:
    """Returns the model whose weights the run started from, which may no longer exist when it resumes."""
    if resumed is not None:
        return resumed.state["run"].get("parent")
    initial = config.checkpoint.initial
    return parent_of(initial).model_dump() if initial else None


def _record_damages(config: RunConfig, damages: list[Damage]) -> None:
    for damage in damages:
        details = {"path": str(damage.path), "reason": damage.reason}
        record_event(Path(config.run_dir), "checkpoint set aside", damage.step, **details)


def _record_change(config: RunConfig, resumed: Resumed, record: dict[str, Any]) -> None:
    change = change_since(resumed.state, record)
    for event, lines in (("data replaced", change.replaced), ("data appended", change.appended)):
        if lines:
            record_event(Path(config.run_dir), event, resumed.state["step"], changes=lines)


def _announce(report: Report, config: RunConfig, resumed: Resumed | None, mesh: Mesh) -> None:
    weights = config.checkpoint.initial or "initial weights"
    begin = f"resuming from {resumed.path}" if resumed else f"starting from {weights}"
    layout, precision = config.parallel.describe(), config.training.precision
    report.message(f"{config.run_dir}: {layout}, {precision} on {mesh.device.type}; {begin}")
