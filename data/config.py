"""Configuration of the data: what is read, and in which order."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, Field, PositiveInt

from triplane.storage.foreign import Place

Weight = Annotated[float, Field(ge=0, le=1e12)]
"""Bounded, so that sums of weights are finite."""
_SeqLen = Annotated[int, Field(gt=0, le=2**31 - 1)]
"""Bounded, as torch's kernels count tokens in 32 bits."""


class SourceConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A corpus and its weight."""

    corpus: Place
    """Folder written by `triplane prepare`, or its fsspec URL (`https://...`, `s3://...`, `gs://...`). Or WebDataset
    tars with `txt` or `json` members, as a path, URL or pattern ending in `.tar`, which are tokenized once."""
    weight: Weight = 1.0
    """Share of the sequences from this source, relative to the other weights, until a phase changes it."""

    @property
    def is_tars(self) -> bool:
        """True for tars of text, False for a prepared corpus."""
        return self.corpus.endswith(".tar")


class PhaseConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A change of weights or sequence length at a position in the run."""

    from_sequence: PositiveInt
    """Sequences read before it, over all ranks."""
    weights: list[Weight] | None = None
    """One per source, in order; None keeps them."""
    seq_len: _SeqLen | None = None
    """Tokens in a sequence from here on; None keeps the length."""


class DataConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """The corpora to read, and how to cut them into sequences."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Corpora that share a tokenizer. May be appended to during a run, with weight 0 until a phase changes it."""
    phases: list[PhaseConfig] = []
    """Changes of weights or length. May be appended to during a run; earlier positions keep their meaning."""
    tokenizer: Place | None = None
    """Sentencepiece model, `tokenizer.json` or folder with one, for sources that are tars; prepared corpora include
    theirs."""
    seq_len: _SeqLen
    """Tokens predicted per sequence, until a phase changes it. Validation keeps this length."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """`concatenate`: cut sequences from the text as stored. `best_fit`: combine whole documents, cut only those longer
    than a sequence, and pad the rest. Validation is always concatenated."""
    document_mask: bool = True
    """True: tokens attend only within their document, positions restart at 0 in each, and a document's first token
    is never a target."""
    shuffle_window: int = Field(default=4096, gt=0, le=2**40)
    """Sequences, of the first length, that are shuffled together; neighbours in a window share shards."""
    lanes: Literal[1, 2, 4, 8, 16, 32, 64] = 1
    """Position p belongs to lane p mod `lanes`, and no two lanes of a window read the same shards. With a multiple of
    the dp ranks, a shard is fetched by one node per window instead of by all."""
    num_workers: int = Field(default=0, ge=0, le=256)
    """Loader processes per rank; 0 reads in the training process. Does not affect the order."""
    cache_dir: Place = "~/.cache/triplane"
    """Local folder for the shards of corpora at URLs, shared by the ranks of a node."""
    cache_gib: float = Field(default=64, gt=0, le=2**30)
    """Size limit of `cache_dir`; the least recently opened shards are removed first."""
    download_retries: int = Field(default=5, ge=0)
    """Retries of a failed transfer, each after a longer wait, before the run stops with an error."""
    download_timeout_s: float = Field(default=60, gt=0, le=1e7)
    """A transfer fails after this long without a byte."""

    @property
    def run_tokens(self) -> int:
        """Tokens per run, the unit that is shuffled as a whole: about sqrt(`shuffle_window`) sequences."""
        return round(math.sqrt(self.shuffle_window)) * self.seq_len

    @property
    def window_runs(self) -> int:
        """Runs in a window, a multiple of `lanes`."""
        return max(1, self.shuffle_window * self.seq_len // self.run_tokens // self.lanes) * self.lanes

    def timeline(self) -> list[tuple[int, list[float], int]]:
        """Returns first position, weights and seq_len of each phase, starting with the initial one."""
        phases = [(0, [source.weight for source in self.sources], self.seq_len)]
        for phase in self.phases:
            _, weights, seq_len = phases[-1]
            if phase.weights is not None:
                weights = phase.weights
            phases.append((phase.from_sequence, weights, phase.seq_len or seq_len))
        return phases

    def seq_len_at(self, position: int) -> int:
        """Returns the tokens in the sequence at `position`."""
        return [seq_len for start, _, seq_len in self.timeline() if start <= position][-1]

    @property
    def length_changes(self) -> list[int]:
        """Positions from which sequences have another length."""
        return [start for (_, _, old), (start, _, new) in pairwise(self.timeline()) if new != old]

    def problems(self) -> Iterator[str]:
        """Yields invalid combinations of keys."""
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
                yield f"{where}: from_sequence ({start}) is not after {before}, where the previous phase starts"
            if new == old:
                continue
            if max(old, new) % min(old, new):
                yield f"{where}: seq_len changes from {old} to {new}, but one must be a multiple of the other"
            if self.run_tokens % new:
                yield (
                    f"{where}: seq_len ({new}) does not divide the runs of {self.run_tokens} tokens; choose another "
                    f"seq_len, or a larger shuffle_window in a new run"
                )
            if self.packing == "best_fit":
                yield f'{where}: seq_len changes, which packing = "best_fit" does not support'
        if self.packing == "best_fit" and not self.document_mask:
            yield 'data: packing = "best_fit" requires document_mask = true: documents in a sequence are unrelated'
