"""The choices that define what is read, in which order."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt


class SourceConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A prepared corpus and how much of it is read."""

    corpus: str
    """Folder that `triplane prepare` wrote, or its fsspec URL (`https://...`, `s3://...`, `gs://...`). Or WebDataset
    tars with `txt` or `json` members, a path, URL or pattern that ends in `.tar`: they are tokenized once."""
    weight: NonNegativeFloat = 1.0
    """Share of the sequences from this source, relative to the other weights, until a phase gives another one."""

    @property
    def is_tars(self) -> bool:
        """True for tars of text, False for a prepared corpus."""
        return self.corpus.endswith(".tar")


class PhaseConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A change of what is read, from a position of the run on."""

    from_sequence: PositiveInt
    """Sequences, over all ranks, that are read before."""
    weights: list[NonNegativeFloat]
    """One for each source, in their order."""
    seq_len: PositiveInt | None = None
    """Tokens in a sequence from here on; None: as before."""


class DataConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """What is read, and how it is cut into sequences."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Corpora with one tokenizer. Append to it during a run, with weight 0 until a phase gives another."""
    phases: list[PhaseConfig] = []
    """Changes of weights or length. Append to it during a run; earlier positions keep their meaning."""
    tokenizer: str | None = None
    """Sentencepiece model, `tokenizer.json` or folder with one, for sources that are tars; prepared corpora have their
    own."""
    seq_len: PositiveInt
    """Tokens in a sequence that the model predicts, until a phase gives another number. Validation keeps this one."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """`concatenate`: sequences are cut from the text as it is stored. `best_fit`: whole documents are put together,
    none that fits is cut, and the room left is padding. Validation is always concatenated."""
    document_mask: bool = True
    """True: tokens attend only within their document, positions start at 0 in each, and no loss
    is taken on a token that follows another document's end."""
    shuffle_window: PositiveInt = 4096
    """Sequences of the first length that are shuffled together; neighbours in a window share shards."""
    lanes: Literal[1, 2, 4, 8, 16, 32, 64] = 1
    """Position p belongs to lane p mod `lanes`, and in a window no two lanes read the same shards. A multiple
    of the dp ranks lets nodes fetch each shard once in a window and not each of them."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes of each rank; 0 reads in the training process. Never changes the order."""
    cache_dir: str = "~/.cache/triplane"
    """Folder on a disk of the node where shards of a corpus at a URL are kept; its ranks share it."""
    cache_gib: PositiveFloat = 64
    """The most that `cache_dir` may hold; shards that were opened longest ago are removed first."""
    download_retries: int = Field(default=5, ge=0)
    """Further tries of a failed transfer, each after a longer wait, before the run stops with an error."""
    download_timeout_s: float = Field(default=60, gt=0, le=1e7)
    """A transfer that brings no byte for this long has failed."""

    @property
    def run_tokens(self) -> int:
        """Tokens of the runs that are shuffled as a whole: about the root of `shuffle_window` in sequences."""
        return round(math.sqrt(self.shuffle_window)) * self.seq_len

    @property
    def window_runs(self) -> int:
        """Runs in a window, a multiple of `lanes`."""
        return max(1, self.shuffle_window * self.seq_len // self.run_tokens // self.lanes) * self.lanes

    def timeline(self) -> list[tuple[int, list[float], int]]:
        """First position, weights and seq_len of each phase, the first one included."""
        phases = [(0, [source.weight for source in self.sources], self.seq_len)]
        for phase in self.phases:
            phases.append((phase.from_sequence, list(phase.weights), phase.seq_len or phases[-1][2]))
        return phases

    def seq_len_at(self, position: int) -> int:
        """Tokens in the sequence at `position`."""
        return [seq_len for start, _, seq_len in self.timeline() if start <= position][-1]

    def problems(self, global_batch_size: int) -> Iterator[str]:
        """What the keys can't be together."""
        timeline = self.timeline()
        for number, (start, weights, _) in enumerate(timeline):
            where = f"data.phases[{number - 1}]" if number else "data.sources"
            if len(weights) != len(self.sources):
                yield f"{where}: {len(weights)} weights for {len(self.sources)} sources; give one for each"
            if not sum(weights):
                yield f"{where}: all weights are 0; give a source a positive one"
            if start % self.lanes:
                yield f"{where}: from_sequence ({start}) is not a multiple of lanes ({self.lanes})"
        for number, ((before, _, old), (start, _, new)) in enumerate(pairwise(timeline)):
            where = f"data.phases[{number}]"
            if start <= before:
                yield f"{where}: from_sequence ({start}) is not after {before}, where the phase before begins"
            if new == old:
                continue
            if max(old, new) % min(old, new):
                yield f"{where}: seq_len goes from {old} to {new}, but one must be a multiple of the other"
            if self.run_tokens % new:
                yield (
                    f"{where}: seq_len ({new}) does not divide the runs of {self.run_tokens} tokens; take another "
                    f"one, or a larger shuffle_window in a new run"
                )
            if self.packing == "best_fit":
                yield f'{where}: seq_len changes, which packing = "best_fit" cannot do'
            if start % global_batch_size:
                yield (
                    f"{where}: seq_len changes at from_sequence ({start}), within a step: take a multiple of "
                    f"global_batch_size ({global_batch_size})"
                )
        if self.packing == "best_fit" and not self.document_mask:
            yield 'data: packing = "best_fit" needs document_mask = true: documents in a sequence are unrelated'
        if global_batch_size % self.lanes:
            yield f"global_batch_size ({global_batch_size}) is not a multiple of data.lanes ({self.lanes})"
