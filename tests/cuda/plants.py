"""Mistakes that only a GPU would show, planted to see them caught."""

from dataclasses import replace
from typing import Any

from torch import Tensor


def tensor_on_the_host(engine: Any) -> None:
    """The targets stay on the CPU."""
    share = engine._share
    engine._share = lambda batch: replace(share(batch), targets_T=batch.targets_T.cpu())


def item(engine: Any) -> None:
    """The number of targets is read in every step."""
    count = engine._count_targets

    def counted(batches: Any) -> Tensor:
        total: Tensor = count(batches)
        assert total.item() is not None
        return total

    engine._count_targets = counted
