"""The training loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triplane.checkpoint.store import CheckpointStore
from triplane.data.loader import SequenceDataset
from triplane.data.tokenizer import Tokenizer
from triplane.model.batch import Batch
from triplane.model.count import flops_per_token
from triplane.model.generate import generate
from triplane.parallel.engine import Engine, StepLoss
from triplane.storage.errors import CheckpointError, TrainingError
from triplane.training.batches import Feed
from triplane.training.config import FaultsConfig, OptimizerConfig, ProfileConfig, ScheduleConfig, TrainingConfig
from triplane.training.evaluation import HeldOut, validation_losses
from triplane.training.guard import problem
from triplane.training.hardware import peak_memory_gib
from triplane.training.profiling import Profiler
from triplane.training.repetition import twice
from triplane.training.replicas import differing_ranks
from triplane.training.report import Report
from triplane.training.schedule import learning_rate, warmup_steps
from triplane.training.state import State
from triplane.training.stopping import Stopping, request_name
from triplane.training.verdicts import Agreement, Verdict
from triplane.training.watchdog import Watchdog

_SAMPLE_TOKENS = 48
_SAVE_S = 1800.0
"""A save may wait so long for the one before it, and the end of a run for the last."""


@dataclass(frozen=True)
class Corpora:
    """What is read."""

    train: SequenceDataset
    validation: Sequence[HeldOut]
    tokenizer: Tokenizer
    seq_len_at: Callable[[int], int]
    """Tokens in the training sequence at a position."""


@dataclass(frozen=True)
class Settings:
    """How it is trained."""

    run_dir: Path
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    faults: FaultsConfig
    profile: ProfileConfig
    checkpoint_every_steps: int
    peak_flops_per_s: float
    """Of one rank, for MFU."""


class Trainer:
    """Takes a run from a state to its last step. Every rank has one; only rank 0's `report` shows anything."""

    def __init__(
        self,
        engine: Engine,
        corpora: Corpora,
        feed: Feed,
        settings: Settings,
        store: CheckpointStore,
        restore: Callable[[], State],
        run_record: dict[str, Any],
        report: Report,
        watchdog: Watchdog,
    ):
        """`restore` loads the newest checkpoint, or the initial weights if there is none; collective."""
        self.engine = engine
        self.corpora = corpora
        self.counted = copy(corpora.train)  # its place in the plan is the loop's own
        self.feed = feed
        self.settings = settings
        self.store = store
        self.restore = restore
        self.run_record = run_record
        self.report = report
        self.unsaved: str | None = None
        """Why the last save failed."""
        self.watchdog = watchdog
        self.watch = watchdog.stopwatch
        self.agreement = Agreement(engine.mesh.device)
        first_step_tokens = settings.training.global_batch_size * corpora.seq_len_at(0)
        self.warmup_steps = warmup_steps(settings.schedule, first_step_tokens)

    def run(self, state: State) -> State:
        """Trains until `steps`, `stop_at_step` or a request to leave; the state then is on disk."""
        settings, rank = self.settings, self.engine.mesh.rank
        last = min(settings.training.stop_at_step or settings.training.steps, settings.training.steps)
        if state.step >= last:
            self.report.message(f"step {state.step} of {settings.training.steps} is done already")
            return state
        stopping = Stopping(settings.run_dir, rank)
        with Profiler(settings.profile, settings.run_dir, rank) as profiler:
            return self._run(state, last, stopping, profiler)

    def _run(self, state: State, last: int, stopping: Stopping, profiler: Profiler) -> State:
        watchdog = self.watchdog
        size = self.settings.training.global_batch_size
        batches = self._batches_from(state, last)
        logged, padding = state, 0
        stop = 0
        while state.step < last and not stop:
            step, start = state.step + 1, state.consumed_sequences
            due = self._due(step, last)
            with profiler.step(step), watchdog.work("step", step):
                loss, norm, rate = self._update(step, partial(next, batches), exact="log" in due)
                with self.watch.phase("data_time_s"):
                    tokens = self.counted.count_tokens(range(start, start + size))
                padding += size * self.corpora.seq_len_at(start) - tokens
                state = state.after(size, tokens)
                with self.watch.phase("forward_backward_time_s"):  # which is what is waited for
                    self.agreement.put(step, start, stopping.request(), loss.cross_entropy, norm)
                    verdicts = self.agreement.take(everything=bool(due))
                    if stop := max((verdict.stop for verdict in verdicts), default=0):
                        verdicts += self.agreement.take(everything=True)
                        due.add("save")
            state, bad = self._judge(state, verdicts)
            if bad is not None:
                with watchdog.work("rollback", step):
                    state, stop = self._roll_back(state, *bad), 0
                logged, padding = state, 0
                batches = self._batches_from(state, last)
                continue
            if state.consumed_sequences != start + size:
                batches = self._batches_from(state, last)
            if "compare" in due:
                with watchdog.work("comparison", step):
                    self._compare_replicas(step)
            if "log" in due:
                with watchdog.work("log", step):
                    self._log(state, logged, padding, loss, norm, rate)
                logged, padding = state, 0
            validated = None
            if "validate" in due:
                with watchdog.work("validation", step):
                    validated = self._validate(state)
            if "sample" in due:
                with watchdog.work("sample", step):
                    self._sample(state)
            if "save" in due:
                with watchdog.work("checkpoint", step, usually_s=_SAVE_S):
                    self.save(state, validated)
            self._report_saves()
        with watchdog.work("last save", state.step, at_least_s=_SAVE_S):
            self._finish_saves()
        if stop:
            name = request_name(stop)
            self.report.event(state.step, "signal", name=name)
            self.report.message(f"step {state.step}: saved and left because of {name}")
            stopping.obeyed()
        return state

    def save(self, state: State, validation_loss: float | None = None) -> None:
        """Begins to write a checkpoint; collective."""
        self.store.save(
            state.step,
            self.engine.optimizer.fragments(),
            {**asdict(state), "validation_loss": validation_loss, "run": self.run_record},
        )

    def _report_saves(self, wait: bool = False) -> None:
        for save in self.store.ended(wait):
            self.report.saved(save)
            self.unsaved = save.error

    def _finish_saves(self) -> None:
        """Waits for the last save; raises CheckpointError if it has failed."""
        self._report_saves(wait=True)
        if self.unsaved:
            raise CheckpointError(f"the run's last state is not saved: {self.unsaved}, then start again")

    def _update(self, step: int, read: Callable[[], list[Batch]], exact: bool) -> tuple[StepLoss, Tensor, float]:
        """One step; returns the loss, the gradient's norm and the learning rate."""
        settings = self.settings
        rate = learning_rate(settings.schedule, settings.optimizer.lr, step, settings.training.steps, self.warmup_steps)
        with self.watch.phase("data_time_s"):
            batches = read()

        def update() -> tuple[StepLoss, Tensor]:
            with self.watch.phase("forward_backward_time_s", exact):
                loss = self.engine.forward_backward(batches)
            with self.watch.phase("optimizer_time_s", exact):
                self.store.wait_until_copied()
                return loss, self.engine.step(rate)

        every = settings.faults.repeat_step_every_steps
        if every is None or step % every:
            return *update(), rate
        (loss, norm), ranks = twice(self.engine, step, update)
        if ranks:
            raise TrainingError(
                f"step {step}: done twice, it gave two states on ranks {ranks}; take the machine that errs out, then "
                f"start again from the last checkpoint"
            )
        return loss, norm, rate

    def _batches_from(self, state: State, last: int) -> Iterator[list[Batch]]:
        """Global batches one after another; what is skipped begins anew."""
        size = self.settings.training.global_batch_size
        return self.feed.steps(self.corpora.train, size, state.consumed_sequences, last - state.step)

    def _due(self, step: int, last: int) -> set[str]:
        """What follows this step."""
        training, final = self.settings.training, step == self.settings.training.steps
        return {
            name
            for name, every, at_least in (
                ("log", training.log_every_steps, step == last),
                ("validate", training.eval_every_steps, final),
                ("sample", training.sample_every_steps, final),
                ("save", self.settings.checkpoint_every_steps, step == last),
                ("compare", self.settings.faults.compare_replicas_every_steps, False),
            )
            if every is not None and (step % every == 0 or at_least)
        }

    def _judge(self, state: State, verdicts: list[Verdict]) -> tuple[State, tuple[Verdict, str] | None]:
        """The state with what is to be remembered of the steps, or the first bad one and what is wrong with it."""
        faults = self.settings.faults
        for verdict in verdicts:
            if what := problem(verdict, state.recent, faults):
                return state, (verdict, what)
            if faults.spike_z is not None:
                state = state.remembering(verdict.loss, verdict.gradient_norm, faults.spike_window)
        return state, None

    def _roll_back(self, state: State, verdict: Verdict, what: str) -> State:
        """To the last checkpoint, and on without the batch of the bad step."""
        size, most = self.settings.training.global_batch_size, self.settings.faults.max_rollbacks
        self._report_saves(wait=True)
        if len(state.skipped) >= most:
            raise TrainingError(
                f"step {verdict.step}: {what}, after {len(state.skipped)} rollbacks (faults.max_rollbacks is {most}); "
                f"lower optimizer.lr or optimizer.grad_clip and start again from the last checkpoint"
            )
        self.agreement.take(everything=True)
        skipped = replace(self.restore(), skipped=state.skipped).skipping(verdict.position, size)
        batch = (verdict.position, verdict.position + size)
        self.report.event(skipped.step, "rollback", from_step=verdict.step, reason=what)
        self.report.event(skipped.step, "skip", sequences=batch)
        self.report.rewind(skipped.step)
        self.report.message(
            f"step {verdict.step}: {what}; back to step {skipped.step}, on without sequences {batch[0]} to {batch[1]}"
        )
        self.watch.take()
        return skipped

    def _compare_replicas(self, step: int) -> None:
        if ranks := differing_ranks(self.engine):
            raise TrainingError(
                f"step {step}: the weights of ranks {ranks} are not those of the ranks that should have the same; "
                f"take the machine that errs out, then start again from the last checkpoint"
            )

    def _log(self, state: State, logged: State, padding: int, loss: StepLoss, norm: Tensor, rate: float) -> None:
        seconds = self.watch.take()
        steps = state.step - logged.step
        names = [*seconds, "memory_gib"]
        mine = [*(total / steps for total in seconds.values()), peak_memory_gib(self.feed.device)]
        # A step is as slow as its slowest rank.
        slowest = torch.tensor(mine, dtype=torch.float64, device=self.feed.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        values = dict(zip(names, slowest.tolist()))
        step_s = sum(values[name] for name in seconds)
        tokens = state.tokens_seen - logged.tokens_seen
        tokens_per_s = tokens / steps / step_s
        ranks = dist.get_world_size()
        flops = flops_per_token(self.engine.config, self.corpora.seq_len_at(logged.consumed_sequences))
        cross_entropy = float(loss.cross_entropy)
        self.report.metrics(
            state.step,
            {
                "loss": cross_entropy,
                "perplexity": math.exp(min(cross_entropy, 700.0)),
                "learning_rate": rate,
                "gradient_norm": float(norm),
                "tokens_seen": state.tokens_seen,
                "padding": padding / (tokens + padding),
                "tokens_per_s": tokens_per_s,
                "tokens_per_s_per_rank": tokens_per_s / ranks,
                "mfu": tokens_per_s * flops / (self.settings.peak_flops_per_s * ranks),
                "step_time_s": step_s,
                **values,
            },
        )

    def _validate(self, state: State) -> float:
        sequences = self.settings.training.eval_sequences
        loss, by_source = validation_losses(self.engine.evaluate, self.feed, self.corpora.validation, sequences)
        self.report.validation(state.step, loss, by_source)
        return loss

    def _sample(self, state: State) -> None:
        tokenizer = self.corpora.tokenizer
        tokens = generate(
            self.engine.next_logits,
            [tokenizer.bos_id],
            _SAMPLE_TOKENS,
            temperature=0.8,
            top_k=50,
            seed=state.step,
            eos_id=tokenizer.eos_id,
        )
        self.report.sample(state.step, tokenizer.decode(tokens))
