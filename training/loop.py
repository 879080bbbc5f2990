"""The training loop."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.store import CheckpointStore
from triplane.data.loader import SequenceDataset
from triplane.data.tokenizer import Tokenizer
from triplane.model.count import flops_per_token
from triplane.model.generate import generate
from triplane.parallel.engine import Engine, StepLoss
from triplane.training.batches import Feed
from triplane.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from triplane.training.errors import TrainingError
from triplane.training.evaluation import validation_loss
from triplane.training.hardware import peak_memory_gib
from triplane.training.report import Report
from triplane.training.schedule import learning_rate, warmup_steps
from triplane.training.state import State
from triplane.training.stopwatch import Stopwatch

_SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Corpora:
    """What is read."""

    train: SequenceDataset
    validation: SequenceDataset
    tokenizer: Tokenizer
    seq_len_at: Callable[[int], int]
    """Tokens in the training sequence at a position."""


@dataclass(frozen=True)
class Settings:
    """How it is trained."""

    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
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
        run_record: dict[str, Any],
        report: Report,
    ):
        self.engine = engine
        self.corpora = corpora
        self.feed = feed
        self.settings = settings
        self.store = store
        self.run_record = run_record
        self.report = report
        self.unsaved: str | None = None
        """Why the last save failed."""
        self.watch = Stopwatch(engine.mesh.device)
        first_step_tokens = settings.training.global_batch_size * corpora.seq_len_at(0)
        self.warmup_steps = warmup_steps(settings.schedule, first_step_tokens)

    def run(self, state: State) -> State:
        """Trains until `steps`, or `stop_at_step`; the state then is on disk."""
        training = self.settings.training
        last = min(training.stop_at_step or training.steps, training.steps)
        if state.step >= last:
            self.report.message(f"step {state.step} of {training.steps} is done already")
        steps = self.feed.steps(
            self.corpora.train, training.global_batch_size, state.consumed_sequences, max(0, last - state.step)
        )
        logged = state
        while state.step < last:
            step = state.step + 1
            log = step % training.log_every_steps == 0 or step == last
            with self.watch.phase("data_time_s"):
                batches = next(steps)
            with self.watch.phase("forward_backward_time_s", exact=log):
                loss = self.engine.forward_backward(batches)
            with self.watch.phase("optimizer_time_s", exact=log):
                rate = learning_rate(
                    self.settings.schedule, self.settings.optimizer.lr, step, training.steps, self.warmup_steps
                )
                norm = self.engine.step(rate)
            seq_len = self.corpora.seq_len_at(state.consumed_sequences)
            state = state.after(training.global_batch_size, training.global_batch_size * seq_len)
            if log:
                self._log(state, logged, loss, norm, rate)
                logged = state
            validation_loss = self._validate(state) if self._due(step, training.eval_every_steps) else None
            if training.sample_every_steps and self._due(step, training.sample_every_steps):
                self._sample(state)
            if step % self.settings.checkpoint_every_steps == 0 or step == last:
                self._check_finite(step, loss, norm)
                self.save(state, validation_loss)
            self._report_saves()
        self._finish_saves()
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

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.settings.training.steps

    def _log(self, state: State, logged: State, loss: StepLoss, norm: Tensor, rate: float) -> None:
        self._check_finite(state.step, loss, norm)
        seconds = self.watch.take()
        steps = state.step - logged.step
        names = [*seconds, "memory_gib"]
        mine = [*(total / steps for total in seconds.values()), peak_memory_gib(self.feed.device)]
        # A step is as slow as its slowest rank.
        slowest = torch.tensor(mine, dtype=torch.float64, device=self.feed.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        values = dict(zip(names, slowest.tolist()))
        step_s = sum(values[name] for name in seconds)
        tokens_per_s = (state.tokens_seen - logged.tokens_seen) / steps / step_s
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
                "tokens_per_s": tokens_per_s,
                "tokens_per_s_per_rank": tokens_per_s / ranks,
                "mfu": tokens_per_s * flops / (self.settings.peak_flops_per_s * ranks),
                "step_time_s": step_s,
                **values,
            },
        )

    def _validate(self, state: State) -> float:
        sequences = self.settings.training.eval_sequences
        loss = validation_loss(self.engine.evaluate, self.feed, self.corpora.validation, sequences)
        self.report.validation(state.step, loss)
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

    def _check_finite(self, step: int, loss: StepLoss, norm: Tensor) -> None:
        if not (math.isfinite(loss.cross_entropy) and math.isfinite(norm)):
            self._report_saves(wait=True)
            raise TrainingError(
                f"step {step}: loss {float(loss.cross_entropy)}, gradient norm {float(norm)}: the run diverged and was "
                f"not saved; lower optimizer.lr or optimizer.grad_clip and start again from the last checkpoint"
            )
