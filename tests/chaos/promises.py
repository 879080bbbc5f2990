"""Checks that a run with faults keeps its promises, beside a run without."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from chaos.victim import BrokenError, Victim
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from triplane.checkpoint.folder import latest
from triplane.checkpoint.reader import Checkpoint

_BEGINS = ("start", "resume", "rollback")


def check(victim: Victim, reference: Victim, every_steps: int, tolerance: float) -> None:
    """Raises BrokenError if one does not. `tolerance` of the curves is relative; 0: they are equal.

    Weights may differ ten times as much of the largest one: Adam divides by the root of small moments.
    """
    _batches(victim, reference)
    _curve(victim, reference, tolerance)
    _weights(victim, reference, tolerance)
    _tensorboard(victim)
    _nothing_lost(victim, every_steps)
    _nothing_left(victim)


def final(victim: Victim) -> Checkpoint:
    """The state of the run in the end."""
    newest = latest(victim.checkpoints)
    assert newest is not None
    return Checkpoint(newest)


def _batches(victim: Victim, reference: Victim) -> None:
    """Whatever was read of a position is what the reference read, and each step at last read the same positions."""
    expected = _sequences(reference)
    skipped = {at for start, stop in final(victim).state["skipped"] for at in range(start, stop)}
    for at, crcs in _sequences(victim).items():
        if len(crcs) != 1 or (at not in skipped and crcs != expected.get(at)):
            raise BrokenError(f"sequence {at} was read as {crcs}, by the reference as {expected.get(at)}")
    ours, theirs = ({line["step"]: line["position"] for line in run.batches()} for run in (victim, reference))
    if ours != theirs:
        steps = [step for step in ours | theirs if ours.get(step) != theirs.get(step)]
        raise BrokenError(
            f"steps {steps} read from {[ours.get(s) for s in steps]}, not {[theirs.get(s) for s in steps]}"
        )
    if missing := expected.keys() - _sequences(victim).keys():
        raise BrokenError(f"sequences {sorted(missing)} were never read")


def _sequences(run: Victim) -> dict[int, set[int]]:
    """The checksums with which each position was read."""
    found: dict[int, set[int]] = defaultdict(set)
    for line in run.batches():
        for number, crc in enumerate(line["crcs"]):
            found[line["position"] + line["dp_rank"] + number * line["dp_size"]].add(crc)
    return found


def _curve(victim: Victim, reference: Victim, tolerance: float) -> None:
    for name in ("loss", "gradient_norm", "tokens_seen", "learning_rate"):
        ours, theirs = ([(line["step"], line[name]) for line in run.metrics(name)] for run in (victim, reference))
        if [step for step, _ in ours] != [step for step, _ in theirs]:
            raise BrokenError(
                f"{name}: steps {[step for step, _ in ours]} are logged, not 1 to {len(theirs)} once each"
            )
        for (step, a), (_, b) in zip(ours, theirs):
            if not abs(a - b) <= tolerance * abs(b):
                raise BrokenError(f"{name} of step {step} is {a!r}, of the reference {b!r}")


def _weights(victim: Victim, reference: Victim, tolerance: float) -> None:
    ours, theirs = final(victim), final(reference)
    for key in theirs.shapes:
        a, b = ours.tensor(key), theirs.tensor(key)
        difference, scale = (a - b).abs().max().item(), b.abs().max().item()
        if not (torch.equal(a, b) or difference <= 10 * tolerance * scale):
            raise BrokenError(f"{key} differs by {difference:.1e} of {scale:.1e}")


def _tensorboard(victim: Victim) -> None:
    events = EventAccumulator(str(victim.run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    shown = [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors("1 loss/loss")]
    logged = [(line["step"], line["loss"]) for line in victim.metrics("loss")]
    if [step for step, _ in shown] != [step for step, _ in logged]:
        raise BrokenError(f"TensorBoard has the steps {[step for step, _ in shown]}")
    for (step, a), (_, b) in zip(shown, logged):
        if abs(a - b) > 1e-6 * abs(b):  # it keeps fp32
            raise BrokenError(f"TensorBoard has loss {a} of step {step}, metrics.jsonl {b}")


def _nothing_lost(victim: Victim, every_steps: int) -> None:
    """A start goes on from a checkpoint at most a save in flight before what was trained."""
    batches = victim.batches()
    begins = [line for line in victim.history() if line["event"] in _BEGINS]
    if not victim.history() or victim.history()[-1]["event"] != "stopped" or begins[0]["event"] != "start":
        raise BrokenError(f"the history is {victim.history()}")
    for before, begin in pairwise(begins):
        trained = [line["step"] for line in batches if before["time"] < line["time"] < begin["time"]]
        events = [line["event"] for line in victim.history() if before["time"] <= line["time"] <= begin["time"]]
        unusable = events.count("checkpoint set aside") + events.count("save failed")
        lost = max(trained, default=begin["step"]) - begin["step"]
        if lost > every_steps * (2 + unusable):
            raise BrokenError(f"{lost} steps were lost before {begin}, {unusable} checkpoints were unusable")


def _nothing_left(victim: Victim) -> None:
    if processes := victim.processes():
        raise BrokenError(f"processes stay: {sorted(processes)}")
    left = [path for folder in (victim.run, victim.checkpoints) for path in folder.rglob("*") if _is_temporary(path)]
    left += [path for path in victim.temporary.iterdir() if not _is_of_a_killed_worker(path)]
    if left:
        raise BrokenError(f"left behind: {sorted(map(str, left))}")
    tracebacks = [path for path in (victim.folder / "output").glob("*.err") if "Traceback" in path.read_text()]
    if tracebacks:
        raise BrokenError(f"tracebacks on the terminal: {tracebacks[0].read_text()[-3000:]}")


def _is_of_a_killed_worker(path: Path) -> bool:
    """The folder of its sockets, or an empty file of torch's: its end may cut in as torch looks why no batch came."""
    return path.name.startswith("pymp-") or (path.name.startswith("tmp") and path.is_file() and not path.stat().st_size)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith((".partial", ".tmp", ".old", ".failure.json"))
