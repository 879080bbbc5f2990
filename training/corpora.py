"""The training and validation data of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triplane.data.loader import SequenceDataset
from triplane.data.opening import Sources, training_plan
from triplane.data.tokenizer import Tokenizer
from triplane.parallel.rank_0 import on_rank_0
from triplane.training.config import RunConfig
from triplane.training.evaluation import HeldOut, held_out


@dataclass(frozen=True)
class Corpora:
    """The sources of a run in the order of its plan."""

    train: SequenceDataset
    validation: Sequence[HeldOut]
    tokenizer: Tokenizer
    seq_len_at: Callable[[int], int]
    """Returns the tokens in the training sequence at a position."""

    @classmethod
    def of(cls, config: RunConfig, sources: Sources) -> "Corpora":
        """Plans the order of the sources; collective."""
        data, packed = config.data, config.folder.packing

        def write_plans() -> None:
            training_plan(data, sources.train, config.seed, packed)

        on_rank_0(write_plans)  # before the other ranks read them
        plan = training_plan(data, sources.train, config.seed, packed)
        return cls(
            train=SequenceDataset(sources.train, plan, data.document_mask),
            validation=held_out(data, sources.validation),
            tokenizer=sources.tokenizer,
            seq_len_at=data.seq_len_at,
        )
