"""The choices that define what is read, in which order."""

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt


class DataConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """A prepared corpus and how it is cut into sequences."""

    corpus: str
    """Folder that `triplane prepare` wrote, or its fsspec URL (`https://...`, `s3://...`, `gs://...`)."""
    seq_len: PositiveInt
    """Tokens in a sequence that the model predicts."""
    document_mask: bool = True
    """True: tokens attend only within their document, positions start at 0 in each, and no loss
    is taken on a token that follows another document's end."""
    shuffle_window: PositiveInt = 4096
    """Sequences that are shuffled together; neighbours in a window share shards."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes of each rank; 0 reads in the training process. Never changes the order."""
    cache_dir: str = "~/.cache/triplane"
    """Folder on a disk of the node where shards of a corpus at a URL are kept; its ranks share it."""
    cache_gib: PositiveFloat = 64
    """The most that `cache_dir` may hold; shards that were opened longest ago are removed first."""
    download_retries: int = Field(default=5, ge=0)
    """Further tries of a failed transfer, each after a longer wait, before the run stops with an error."""
    download_timeout_s: PositiveFloat = 60
    """A transfer that brings no byte for this long has failed."""
