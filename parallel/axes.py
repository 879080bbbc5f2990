"""Which axes of a weight the tp and ep ranks split. Imports no torch."""

from math import prod

from triplane.model.weights import Axis, Elements, Weight

_ROW_MULTIPLE = 8
_SPLIT = {"vocab", "head", "kv_head", "hidden"}
_WHOLE = {"dim", "head_dim", "position", "bucket", "gain", "expert", "choice", "q_rank", "kv_rank", "rope", "joined"}


def split_dim(weight: Weight, tp: int) -> int | None:
    """Returns the dim of `weight` of which each tp rank holds a share; None if each rank holds the whole.

    A matrix whose output axis is split is a column, one whose input axis is split a row (Shoeybi et al. 2019). The
    exception: fewer key and value heads than ranks are held whole, since a rank needs a whole one.
    """
    names = [axis.name for axis in weight.axes]
    assert all(name in _SPLIT | _WHOLE for name in names), f"undecided: {weight}"
    dims = [dim for dim, name in enumerate(names) if name in _SPLIT]
    assert len(dims) < 2, f"two split axes: {weight}"
    if tp == 1 or not dims or (names[dims[0]] == "kv_head" and weight.axes[dims[0]].count % tp):
        return None
    return dims[0]


def spreads_experts(weight: Weight, ep: int) -> bool:
    """Returns whether each of ep ranks holds a share of the first axis: that of experts."""
    return ep > 1 and weight.axes[0].name == "expert"


def local_shape(weight: Weight, tp: int) -> tuple[int, ...]:
    """Returns the shape of the share that a tp rank holds, padding included."""
    dim = split_dim(weight, tp)
    return tuple(_share(axis, tp) if number == dim else axis.size for number, axis in enumerate(weight.axes))


def local_elements(weight: Weight, tp: int, ep: int = 1) -> int:
    """Returns the elements that a tp and ep rank holds, padding included."""
    return prod(local_shape(weight, tp)) // (ep if spreads_experts(weight, ep) else 1)


def local_activations(axes: Elements, tp: int) -> int:
    """Returns the elements of a token that a tp rank computes; of heads at least one."""
    return sum(max(1, axis.count // tp) * axis.width if axis.name in _SPLIT else axis.size for axis in axes)


def shares_of(axis: Axis, tp: int) -> int:
    """Returns the number of different shares of an axis that tp ranks multiply: at most one for each piece."""
    return min(tp, axis.count) if axis.name in _SPLIT else 1


def vocabulary_rows(vocab_size: int, tp: int) -> int:
    """Returns a rank's rows of the vocabulary tables; with tp, a multiple of eight, which GPUs multiply fast."""
    return vocab_size if tp == 1 else -(-vocab_size // (tp * _ROW_MULTIPLE)) * _ROW_MULTIPLE


def _share(axis: Axis, tp: int) -> int:
    return vocabulary_rows(axis.size, tp) if axis.name == "vocab" else axis.size // tp
