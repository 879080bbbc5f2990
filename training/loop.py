"""The training loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor

from triplane.checkpoint.store import CheckpointStore
from triplane.model.batch import Batch
from triplane.model.generate import generate
from triplane.parallel.engine import Engine, StepLoss
from triplane.storage.errors import CheckpointError, TrainingError
from triplane.training.anomaly import Anomaly, judge
from triplane.training.callback import Callback
from triplane.training.callbacks import measured
from triplane.training.config import RunConfig
from triplane.training.corpora import Corpora
from triplane.training.evaluation import TextLoss, validation_losses
from triplane.training.feed import Feed
from triplane.training.layers import layer_metrics
from triplane.training.meter import Meter
from triplane.training.noise import GradientNorm, averaged, noise_metrics, norm_of_half
from triplane.training.profiling import Profiler
from triplane.training.repetition import repeated
from triplane.training.replicas import differing_ranks
from triplane.training.report import Report
from triplane.training.schedule import learning_rate, warmup_steps
from triplane.training.state import State
from triplane.training.stopping import Stopping, request_name
from triplane.training.verdicts import Agreement
from triplane.training.watchdog import Watchdog

_SAMPLE_TOKENS = 48
_SAVE_S = 1800.0
"""Time limit, in seconds, of waiting for the previous save, and for the last one at the end of a run."""


class Trainer:
    """Trains from a state to the last step. Every rank has one; only rank 0's `report` prints and records."""

    def __init__(
        self,
        *,
        config: RunConfig,
        engine: Engine,
        corpora: Corpora,
        feed: Feed,
        store: CheckpointStore,
        restore: Callable[[], State],
        run_record: dict[str, Any],
        report: Report,
        watchdog: Watchdog,
        callbacks: Sequence[Callback],
        peak_flops_per_s: float | None,
    ):
        """`restore` loads the newest checkpoint, or the initial weights if there is none; collective.

        `peak_flops_per_s` is one rank's, for MFU; None if it is not published.
        """
        self.config = config
        self.engine = engine
        self.corpora = corpora
        self.counted = copy(corpora.train)  # counting tokens moves its position in the plan
        self.feed = feed
        self.store = store
        self.restore = restore
        self.run_record = run_record
        self.report = report
        self.watchdog = watchdog
        self.callbacks = callbacks
        self.phase = watchdog.stopwatch.phase
        self.meter = Meter(
            engine,
            seq_len_at=corpora.seq_len_at,
            peak_flops_per_s=peak_flops_per_s,
            stopwatch=watchdog.stopwatch,
        )
        self.agreement = Agreement(engine.mesh.device)
        self.learning_rate = partial(
            learning_rate,
            config.schedule,
            peak=config.optimizer.lr,
            steps=config.training.steps,
            warmup_steps=warmup_steps(config.schedule, config.training, corpora.seq_len_at(0)),
        )
        self.unsaved: str | None = None
        """Why the last save failed."""

    def run(self, state: State) -> State:
        """Trains until `steps`, `stop_at_step` or a request to stop, and saves the state."""
        training, rank = self.config.training, self.engine.mesh.rank
        last = min(training.stop_at_step or training.steps, training.steps)
        if state.step >= last:
            self.report.message(f"step {state.step} of {training.steps} is done already")
            return state
        stopping = Stopping(self.config.folder.path, rank)
        with Profiler(self.config.profile, self.config.folder.path, rank) as profiler:
            state, request = self._train(state, last, stopping, profiler)
        with self.watchdog.work("last save", state.step, at_least_s=_SAVE_S):
            self._finish_saves()
        if request:
            name = request_name(request)
            self.report.event(state.step, "signal", name=name)
            self.report.message(f"step {state.step}: saved and left because of {name}")
            stopping.clear()
        return state

    def _train(self, state: State, last: int, stopping: Stopping, profiler: Profiler) -> tuple[State, int]:
        """Returns the state after the last step taken, and the request that stopped it early, else 0."""
        config, engine, work = self.config, self.engine, self.watchdog.work
        request, state = 0, self._before_batch(state)
        batches = self._batches_from(state, last)
        self.meter.restart(position=state.consumed_sequences)
        while state.step < last and not request:
            step, position = state.step + 1, state.consumed_sequences
            size = config.training.batch_size(step)
            due = self._due(step, last)
            exact = "log" in due
            with profiler.step(step), work("step", step):
                lr = self.learning_rate(step)
                with self.phase("data_time_s"):
                    micro_batches = next(batches)
                half = norm_of_half(engine, micro_batches) if "noise" in due else None
                for _ in repeated(engine, step) if "repeat" in due else (None,):
                    with self.phase("forward_backward_time_s", exact):
                        loss = engine.forward_backward(micro_batches)
                    with self.phase("optimizer_time_s", exact):
                        self.store.wait_until_copied()
                        norm = engine.step(lr)
                with self.phase("data_time_s"):
                    positions = range(position, position + size)
                    tokens = self.counted.count_tokens(positions)
                    bytes_per_target = self.counted.bytes_per_target(positions)
                self.meter.count(size * self.corpora.seq_len_at(position), tokens)
                state = self._before_batch(state.after(size, tokens))
                with self.phase("forward_backward_time_s"):  # agreeing waits for the backward pass
                    self.agreement.put(
                        step=step,
                        position=position,
                        stop=stopping.request(),
                        loss=loss,
                        bytes_per_target=bytes_per_target,
                        gradient_norm=norm,
                    )
                    verdicts = self.agreement.take(everything=bool(due))
            request = max((verdict.stop for verdict in verdicts), default=0)
            state, anomaly = judge(state, verdicts, config.faults)
            if anomaly is not None:
                with work("rollback", step):
                    state, request = self._roll_back(state, anomaly), 0
                batches = self._batches_from(state, last)
                continue
            if state.consumed_sequences != position + size:  # the next batch is to be skipped
                batches = self._batches_from(state, last)
            if "compare" in due:
                with work("comparison", step):
                    self._compare_replicas(step)
            if half is not None:
                state = replace(state, noise=averaged(state.noise, half, GradientNorm.of(norm, loss.tokens)))
            if "log" in due:
                with work("log", step):
                    state = self._log(state, micro_batches, loss=loss, norm=norm, lr=lr)
            validation_loss = None
            if "validate" in due:
                with work("validation", step):
                    validation_loss = self._validate(state)
            if "sample" in due:
                with work("sample", step):
                    self._sample(state)
            if "save" in due or request:
                with work("checkpoint", step, usually_s=_SAVE_S):
                    self.save(state, validation_loss)
            self._report_saves()
        return state, request

    def _due(self, step: int, last: int) -> set[str]:
        """Returns what is to be done in this step, or after it."""
        training, faults = self.config.training, self.config.faults
        first, final = step == 1, step == training.steps
        return {
            name
            for name, every, at_least in (
                ("noise", training.noise_scale_every_steps, False),
                ("repeat", faults.repeat_step_every_steps, False),
                ("compare", faults.compare_replicas_every_steps, False),
                ("log", training.log_every_steps, first or step == last),
                ("validate", training.eval_every_steps, final),
                ("sample", training.sample_every_steps, final),
                ("save", self.config.checkpoint.every_steps, step == last),
            )
            if every is not None and (step % every == 0 or at_least)
        }

    def _batches_from(self, state: State, last: int) -> Iterator[list[Batch]]:
        """Yields the global batches of the steps after `state`, up to the next batch to skip."""
        position = state.consumed_sequences
        for steps, size in self.config.training.spans(state.step, last):
            yield from self.feed.steps(
                self.corpora.train, global_batch_size=size, consumed_sequences=position, steps=steps
            )
            position += steps * size

    def _before_batch(self, state: State) -> State:
        """Returns the state before the next batch that may be read."""
        size = self.config.training.batch_size(state.step + 1)
        return state.before(size, self.config.data.length_changes)

    def _roll_back(self, state: State, anomaly: Anomaly) -> State:
        """Returns to the last checkpoint, and skips the anomaly's batch from there on."""
        size, most = self.config.training.batch_size(anomaly.step), self.config.faults.max_rollbacks
        self._report_saves(wait=True)
        if len(state.skipped) >= most:
            raise TrainingError(
                f"step {anomaly.step}: {anomaly.what}, after {len(state.skipped)} rollbacks (faults.max_rollbacks is "
                f"{most}); lower optimizer.lr or optimizer.grad_clip and start again from the last checkpoint"
            )
        self.agreement.take(everything=True)
        restored = replace(self.restore(), skipped=state.skipped)
        skipped = self._before_batch(restored.skipping(anomaly.position, size))
        first, end = anomaly.position, anomaly.position + size
        self.report.event(skipped.step, "rollback", from_step=anomaly.step, reason=anomaly.what)
        self.report.event(skipped.step, "skip", sequences=(first, end))
        self.report.rewind(skipped.step)
        self.report.message(
            f"step {anomaly.step}: {anomaly.what}; back to step {skipped.step}, skipping sequences {first} to {end}"
        )
        self.meter.restart(position=skipped.consumed_sequences)
        return skipped

    def _compare_replicas(self, step: int) -> None:
        if ranks := differing_ranks(self.engine):
            raise TrainingError(
                f"step {step}: the weights of ranks {ranks} differ from those of their replicas; exclude the faulty "
                f"node, then start again from the last checkpoint"
            )

    def _log(self, state: State, batches: list[Batch], *, loss: StepLoss, norm: Tensor, lr: float) -> State:
        """Reports the mean loss since the last regular log; returns the state with no loss unlogged.

        A log at a stop between two regular ones leaves the state as it is, so that the next is that of a whole run.
        """
        nats, targets, text_bytes = state.unlogged
        tokens = max(1, targets)
        text = TextLoss(nats=nats / tokens, tokens=targets, bytes_per_token=text_bytes / tokens)
        learning = {
            "loss": text.nats,
            "bits_per_byte": text.bits_per_byte,
            "perplexity": math.exp(min(text.nats, 700.0)),
            "learning_rate": lr,
            "gradient_norm": float(norm),
            "tokens_seen": state.tokens_seen,
            **noise_metrics(state.noise),
            **layer_metrics(self.config.model, loss),
        }
        their = measured(self.callbacks, batches, self.engine)
        self.report.metrics(state.step, learning | self.meter.read() | their)
        self.meter.restart(position=state.consumed_sequences)
        regular = state.step == 1 or state.step % self.config.training.log_every_steps == 0
        return replace(state, unlogged=State.unlogged) if regular else state

    def _validate(self, state: State) -> float:
        validate = partial(
            validation_losses,
            self.engine.evaluate,
            self.feed,
            self.corpora.validation,
            sequences=self.config.training.eval_sequences,
        )
        (loss, by_source), of_average = validate(), None
        if self.config.optimizer.average_decay is not None:
            with self.engine.averaged(state.step):
                of_average, _ = validate()
        self.report.validation(state.step, loss, by_source, of_average)
        return loss.nats

    def _sample(self, state: State) -> None:
        tokenizer = self.corpora.tokenizer
        tokens = generate(
            self.engine.next_logits,
            [tokenizer.bos_id],
            max_new_tokens=_SAMPLE_TOKENS,
            longest=self.config.model.longest,
            temperature=0.8,
            top_k=50,
            seed=state.step,
            eos_id=tokenizer.eos_id,
        )
        self.report.sample(state.step, tokenizer.decode(list(tokens)))

    def save(self, state: State, validation_loss: float | None = None) -> None:
        """Starts to write a checkpoint; collective."""
        self.store.save(
            state.step,
            self.engine.fragments(),
            {**asdict(state), "validation_loss": validation_loss, "run": self.run_record},
        )

    def _report_saves(self, wait: bool = False) -> None:
        for save in self.store.ended(wait):
            self.report.saved(save)
            self.unsaved = save.error

    def _finish_saves(self) -> None:
        """Waits for the last save; raises CheckpointError if it failed."""
        self._report_saves(wait=True)
        if self.unsaved:
            raise CheckpointError(f"the run's last state is not saved: {self.unsaved}, then start again")
