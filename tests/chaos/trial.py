"""One run under fire: what strikes it is drawn from a seed; in the end every promise is checked."""

import shutil
from pathlib import Path
from random import Random
from typing import NamedTuple

from chaos import promises
from chaos.faults import FAULTS, Scene
from chaos.victim import Victim
from runs import small_run
from small_corpora import Prepared

from triplane.parallel.config import ParallelConfig
from triplane.training.config import RunConfig

LAYOUTS = [
    ParallelConfig(**axes)
    for axes in (
        {"dp": 1, "zero": 0},
        {"dp": 1, "zero": 1},
        {"dp": 2, "zero": 0},
        {"dp": 2, "zero": 1},
        {"dp": 2, "zero": 2},
        {"dp": 2, "zero": 3},
        {"dp": 1, "tp": 2, "zero": 0},
        {"dp": 1, "tp": 2, "sequence_parallel": True},
        {"dp": 1, "pp": 2, "zero": 2},
        {"dp": 1, "cp": 2},
        {"dp": 1, "cp": 2, "cp_method": "ring", "zero": 2},
        {"dp": 2, "pp": 2, "zero": 1},
        {"dp": 1, "tp": 2, "pp": 2, "zero": 0},
        {"dp": 4, "zero": 3},
    )
]
EVERY_STEPS = 5
"""Steps between checkpoints."""
_EXPERTS = {
    "kind": "experts",
    "n_experts": 4,
    "active": 2,
    "hidden_dim": 32,
    "balance": {"kind": "loss", "weight": 1e-2},
}
_GOES_ON = ("start", "resume")


class Recovery(NamedTuple):
    """A fault that the run has survived."""

    kind: str
    seconds: float
    """From the strike until the first new step."""


class Trial:
    """Strikes one run with faults of the given kinds, one after another."""

    def __init__(
        self, prepared: Prepared, folder: Path, seed: int, kinds: list[str], one_layout: bool, disk: Path | None
    ) -> None:
        """`one_layout`: every start has the layout of the first. `disk`: where the checkpoints go, None: the run's."""
        self.draw = Random(seed)
        self.one_layout = one_layout
        self.kinds = kinds
        self.folder = folder
        self.prepared = prepared
        shutil.copytree(prepared.folder, folder / "corpus")
        self.victim = Victim(self._config("run"), folder / "victim")
        if disk is not None:
            self.victim.run.mkdir()
            self.victim.checkpoints.symlink_to(disk)
        self.layouts = LAYOUTS
        self.layouts = [self._drawn_layout(0, len(kinds))] if one_layout else LAYOUTS
        self.layout = self.layouts[0]
        """Layout of the last start."""

    def run(self) -> list[Recovery]:
        """Raises BrokenError, or an AssertionError, if a promise is broken; in any case no process stays."""
        victim = self.victim
        try:
            self._start(0)
            victim.until(lambda: victim.step > 3 * EVERY_STEPS, "a few checkpoints")
            recoveries = [self._survive(number) for number in range(len(self.kinds))]
            self._end()
        finally:
            victim.kill()
        self._compare()
        return recoveries

    def _survive(self, number: int) -> Recovery:
        kind, victim = self.kinds[number], self.victim
        fault = FAULTS[kind]
        if fault.running:
            self._train_to_a_random_step(number)
        else:
            self._leave()
        fault.strike(Scene(victim, self.draw, self.layout))
        struck_s = victim.struck_s
        if fault.ends is not None and (code := victim.ended()) != fault.ends:
            raise victim.broken(f"{kind}: exit code {code} instead of {fault.ends}")
        goes_on_s = self._goes_on(fault.goes_on, struck_s, number + 1) if fault.goes_on else struck_s
        victim.until(lambda: victim.progressed_since(goes_on_s), f"a step after {kind}")
        for event, word in fault.leaves.items():
            if not any(word in str(line["details"]) for line in victim.history(event, struck_s)):
                raise victim.broken(f"{kind}: no {event!r} with {word!r} in history.jsonl")
        return Recovery(kind, victim.metrics("loss")[-1]["time"] - struck_s)

    def _train_to_a_random_step(self, number: int) -> None:
        victim = self.victim
        if victim.process is not None and not self._fits(self.layout, number, number + 1):
            self._leave()
        if victim.process is None:
            self._start(number)
        goal = victim.step + self.draw.randint(1, 2 * EVERY_STEPS)
        victim.until(lambda: victim.step >= goal, f"step {goal}")

    def _goes_on(self, event: str, struck_s: float, number: int) -> float:
        """When the run went on with this event in its history; if it has ended, the user starts it again."""
        victim = self.victim
        if victim.process is not None:
            victim.until(lambda: victim.has_ended() or victim.history(event, struck_s), f"{event!r} in the history")
            if victim.has_ended():
                self._must_not_have_been_able_to_go_on()
        if victim.process is None:
            self._start(number)
            victim.until(lambda: victim.history(event, struck_s), f"{event!r} in the history")
        return victim.history(event, struck_s)[-1]["time"]

    def _must_not_have_been_able_to_go_on(self) -> None:
        """A crash without a new checkpoint since the start ends a run; with one, the launcher starts it again."""
        victim = self.victim
        code = victim.ended()
        begun = [line["step"] for line in victim.history() if line["event"] in _GOES_ON][-1]
        if victim.saved_step != begun:
            raise victim.broken(f"ended with {code}, though it began at {begun} and saved step {victim.saved_step}")

    def _leave(self) -> None:
        """The user stops the run."""
        if self.victim.process is not None:
            FAULTS["SIGTERM"].strike(Scene(self.victim, self.draw, self.layout))
            if code := self.victim.ended():
                raise self.victim.broken(f"left with {code}")

    def _start(self, number: int, *overrides: str) -> None:
        """On a layout that fits the faults from `number` on, until one ends the run."""
        rest = [FAULTS[kind] for kind in self.kinds[number:]]
        lives = next((i for i, fault in enumerate(rest) if fault.ends is not None or not fault.running), len(rest))
        self.layout = self._drawn_layout(number, number + lives + 1)
        workers = max((fault.workers for fault in rest[: lives + 1]), default=0)
        self.victim.start(self.layout, f"data.num_workers={workers}", *overrides)

    def _drawn_layout(self, start: int, stop: int) -> ParallelConfig:
        return self.draw.choice([layout for layout in self.layouts if self._fits(layout, start, stop)])

    def _fits(self, layout: ParallelConfig, start: int, stop: int) -> bool:
        return _ranks(layout) >= max((FAULTS[kind].ranks for kind in self.kinds[start:stop]), default=1)

    def _end(self) -> None:
        self._leave()
        self._start(len(self.kinds), f"training.stop_at_step={self.victim.step + EVERY_STEPS - 1}")
        if code := self.victim.ended():
            raise self.victim.broken(f"the last start ended with {code}")

    def _compare(self) -> None:
        """With a run of the same steps, without what was skipped, that nothing interrupts."""
        victim = self.victim
        state = promises.final(victim).state
        reference = Victim(self._config("reference"), self.folder / "reference", state["skipped"])
        try:
            reference.start(self.layouts[0], f"training.stop_at_step={state['step']}")
            if code := reference.ended():
                raise reference.broken(f"the reference ended with {code}")
        finally:
            reference.kill()
        promises.check(victim, reference, EVERY_STEPS, tolerance=0.0 if self.one_layout else 1e-5)
        for one in (victim, reference):
            shutil.rmtree(one.temporary)

    def _config(self, name: str) -> RunConfig:
        # Between layouts rounding may change the experts of a token, whose scores jump.
        network = {"model": {"feed_forward": _EXPERTS}} if self.one_layout else {}
        kind = {} if self.one_layout else {"kind": "muon", "iterate_in": "fp32"}
        return small_run(
            self.prepared,
            self.folder / name,
            **network,
            data={"sources": [{"corpus": str(self.folder / "corpus")}]},
            optimizer={"lr": 3e-3, "eps": 1e-3, **kind},  # with a smaller eps, differences of rounding grow
            training={"steps": 10_000, "global_batch_size": 4, "micro_batch_size": 1, "eval_every_steps": 10_000},
            checkpoint={"every_steps": EVERY_STEPS, "keep_last": 3},
            faults={"hang_timeout_s": 4.0, "max_restarts": 1000, "max_rollbacks": 1000},
        )


def _ranks(layout: ParallelConfig) -> int:
    assert isinstance(layout.dp, int)
    return layout.dp * layout.ranks_of_one
