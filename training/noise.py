"""The gradient noise scale: the batch size past which larger batches save few steps (McCandlish et al. 2018).

Of two batches the smaller one's gradient has the larger norm, by what its noise adds: E |G_B|^2 = |G|^2 + S / B for B
tokens, where S is the trace of the covariance of a token's gradient. The scale is S / |G|^2 (appendix A.1).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.parallel.engine import Engine

_OLD_SHARE = 0.9
"""Of an average, what earlier estimates make up; a single one is too noisy."""


class GradientNorm(NamedTuple):
    """Squared norm of the mean gradient of some tokens."""

    squared: float
    tokens: int

    @classmethod
    def of(cls, norm: Tensor, tokens: Tensor) -> "GradientNorm":
        return cls(float(norm) ** 2, int(tokens))


def norm_of_half(engine: Engine, batches: Sequence[Batch]) -> GradientNorm:
    """Returns the norm over every other sequence of the global batch, the same ones in every layout. Collective.

    The others pass as well, without targets, so that each schedule and each share of tokens is that of a step.
    """
    dp, halves = engine.mesh.dp, []
    for number, batch in enumerate(batches):
        position_T = (number * batch.sequences + batch.sequences_T) * dp.size + dp.rank
        halves.append(replace(batch, targets_T=batch.targets_T.where(position_T % 2 == 0, IGNORED_TARGET)))
    loss = engine.forward_backward(halves)
    return GradientNorm.of(engine.optimizer.discard(), loss.tokens)


def averaged(before: tuple[float, float], half: GradientNorm, whole: GradientNorm) -> tuple[float, float]:
    """Returns running averages of S and |G|^2 with one more estimate of each."""
    if not 1 < half.tokens < whole.tokens:  # one half is padding, which has no gradient
        return before
    noise = (half.squared - whole.squared) / (1 / half.tokens - 1 / whole.tokens)
    signal = (whole.tokens * whole.squared - half.tokens * half.squared) / (whole.tokens - half.tokens)
    # They start at zero, and so are too small at first, but by the same factor.
    old_noise, old_signal = before
    return (
        _OLD_SHARE * old_noise + (1 - _OLD_SHARE) * noise,
        _OLD_SHARE * old_signal + (1 - _OLD_SHARE) * signal,
    )


def noise_metrics(averages: tuple[float, float]) -> dict[str, float]:
    """Returns the noise scale in tokens; nothing where noise hides the sign of either average."""
    noise, signal = averages
    return {"noise_scale": noise / signal} if noise > 0 and signal > 0 else {}
