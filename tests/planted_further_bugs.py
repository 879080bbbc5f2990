"""Bugs of modules that predict tokens after the next one, with a layout in which each shows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from triplane.model.batch import Batch
from triplane.model.further import FurtherBlock
from triplane.model.modules import unchanged
from triplane.parallel import apply, context, engine, tensor

FURTHER = "two tokens further"
EMBEDDED = (FURTHER, "learned positions", "embedding norm, head bias")
"""All that the last stage copies of the first one."""


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


def _with_the_sum_of_gradients_of_copied_tables_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "copied_weights", lambda config: {"embedding.weight": "last"})


def _with_the_sum_of_gradients_of_all_but_copied_tables(patch: pytest.MonkeyPatch) -> None:
    right = engine.copied_weights
    patch.setattr(
        engine,
        "copied_weights",
        lambda config: {name: stages for name, stages in right(config).items() if name != "embedding.weight"},
    )


def _with_copies_counted_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(apply, "copied_names", lambda model: {})


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = [
    (_with_later_tokens_of_own_share, {"cp": 2, "options": (FURTHER,)}),
    (_with_later_tokens_of_own_share, {"cp": 2, "cp_method": "ring", "options": (FURTHER,)}),
    (_with_later_tokens_of_the_next_segment, {"options": (FURTHER,)}),
    (_without_the_sum_of_gradients_of_joins, {"tp": 2, "sequence_parallel": True, "options": (FURTHER,)}),
    (_with_the_sum_of_gradients_of_copied_tables_alone, {"pp": 2, "dp": 2, "zero": 3, "options": EMBEDDED}),
    (_with_the_sum_of_gradients_of_all_but_copied_tables, {"pp": 2, "options": (FURTHER,)}),
    (_with_copies_counted_twice, {"pp": 2, "options": (FURTHER,)}),
    (_with_copies_counted_twice, {"pp": 2, "dp": 2, "offload_optimizer": True, "options": (FURTHER,)}),
]
