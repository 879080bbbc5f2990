"""Records what a corpus was made from, and what it contains."""

from typing import Any

from pydantic import BaseModel, Field

from triplane.data.dedupe import Dedupe


class Recipe(BaseModel, extra="forbid", frozen=True):
    """Everything that determines the bytes of a corpus, other than the content of its inputs."""

    inputs_digest: str
    """Digest of the names, sizes and versions of the input files."""
    tokenizer_digest: str
    validation_fraction: float
    shard_tokens: int
    text_field: str
    dedupe: Dedupe
    max_document_bytes: int = 256 << 20

    def difference(self, other: Any) -> str:
        """Lists the keys in which a stored recipe `other` differs."""
        theirs = {"max_document_bytes": 256 << 20, **other} if isinstance(other, dict) else {}
        return ", ".join(f"{key} {theirs.get(key)} and not {value}" for key, value in self if theirs.get(key) != value)


class Counts(BaseModel, extra="forbid"):
    """The size of a split."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    lengths: list[int] = Field(default_factory=list)
    """Entry i counts documents of at least 2^i and less than 2^(i + 1) tokens."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per stored token, including bos and eos."""
        return self.text_bytes / self.tokens

    def add(self, tokens: int, text_bytes: int, documents: int = 1) -> None:
        """Adds a document to the counts, or removes it with `documents` -1."""
        self.documents += documents
        self.tokens += documents * tokens
        self.text_bytes += documents * text_bytes
        power = tokens.bit_length() - 1
        self.lengths += [0] * (power + 1 - len(self.lengths))
        self.lengths[power] += documents


class Rejected(BaseModel, extra="forbid"):
    """Inputs rejected for one reason."""

    count: int = 0
    first: str
    """Name of the first one, with details if any."""


class Report(BaseModel, extra="forbid", frozen=True):
    """The result of `prepare`."""

    recipe: Recipe
    train: Counts
    validation: Counts
    rejected: dict[str, Rejected]
    """Inputs that are not in the corpus, including duplicates, by reason; `rejected.jsonl` lists them all."""
    validation_is_end: bool = False
    """True if `validation` is the end of the only document, and `train` its rest."""
    reused: bool = Field(default=False, exclude=True)
    """True if the folder already contained this corpus."""
