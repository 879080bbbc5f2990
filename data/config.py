"""The choices that define what is read, in which order."""

from pydantic import BaseModel, Field, PositiveInt


class DataConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """A prepared corpus and how it is cut into sequences."""

    corpus: str
    """Folder that `triplane prepare` wrote: `train/`, `validation/` and `tokenizer.model`."""
    seq_len: PositiveInt
    """Tokens in a sequence that the model predicts."""
    document_mask: bool = True
    """True: tokens attend only within their document, positions start at 0 in each, and no loss
    is taken on a token that follows another document's end."""
    shuffle_window: PositiveInt = 4096
    """Sequences that are shuffled together; neighbours in a window share shards."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes of each rank; 0 reads in the training process. Never changes the order."""
