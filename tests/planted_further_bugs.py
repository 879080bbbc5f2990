"""Bugs of modules that predict tokens after the next one, with a layout in which each shows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from triplane.model.batch import Batch
from triplane.model.further import FurtherBlock
from triplane.model.modules import unchanged
from triplane.parallel import context, tensor

FURTHER = "two tokens further"


def _with_later_tokens_of_own_share(patch: pytest.MonkeyPatch) -> None:
    right = context.cut_for_context

    def cut(batch: Batch, *args: Any) -> Batch:
        own = right(batch, *args)
        shifts = range(1, 1 + len(batch.further))
        return replace(own, further=tuple((own.tokens_T.roll(-n), own.targets_T.roll(-n)) for n in shifts))

    patch.setattr(context, "cut_for_context", cut)


def _with_later_tokens_of_the_next_segment(patch: pytest.MonkeyPatch) -> None:
    def ahead(self: Batch, depth: int) -> Batch:
        shifts = range(1, 1 + depth)
        return replace(self, further=tuple((self.tokens_T.roll(-n), self.targets_T.roll(-n)) for n in shifts))

    patch.setattr(Batch, "ahead", ahead)


def _without_the_sum_of_gradients_of_joins(patch: pytest.MonkeyPatch) -> None:
    right = tensor.apply_tensor_parallel

    def applied(model: Any, *args: Any) -> None:
        right(model, *args)
        for block in model.blocks.values():
            if isinstance(block, FurtherBlock):
                block.join.shared = unchanged

    patch.setattr(tensor, "apply_tensor_parallel", applied)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = [
    (_with_later_tokens_of_own_share, {"cp": 2, "options": (FURTHER,)}),
    (_with_later_tokens_of_own_share, {"cp": 2, "cp_method": "ring", "options": (FURTHER,)}),
    (_with_later_tokens_of_the_next_segment, {"options": (FURTHER,)}),
    (_without_the_sum_of_gradients_of_joins, {"tp": 2, "sequence_parallel": True, "options": (FURTHER,)}),
]
