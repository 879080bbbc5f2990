"""Metrics of what layers counted in a step."""

from collections.abc import Callable, Iterable, Iterator

from triplane.model.config import ModelConfig
from triplane.parallel.engine import StepLoss

_WORST: dict[str, Callable[[Iterable[float]], float]] = {
    "expert_load": max,
    "router_entropy": min,
    "dropped_tokens": max,
}


def layer_metrics(model: ModelConfig, loss: StepLoss) -> dict[str, float]:
    """Returns the mean loss of modules that predict further, the sum of the losses that layers added, and of the other
    metrics the value of the worst layer; nothing of what there is none.
    """
    further = model.predict_further
    found = {} if further is None else {"further_loss": float(loss.further) / further.weight}
    if not loss.tallies:
        return found
    reports = list(_reports(model, loss))
    worst = {name: of(report[name] for report in reports) for name, of in _WORST.items()}
    return {**found, "added_loss": float(loss.added), **worst}


def _reports(model: ModelConfig, loss: StepLoss) -> Iterator[dict[str, float]]:
    for number, tally in loss.tallies.items():
        feed_forward = model.layer(number).feed_forward
        assert feed_forward is not None
        yield feed_forward.reported(tally.tolist())
