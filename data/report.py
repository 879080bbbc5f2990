"""What a corpus was made from, and what is in it."""

from typing import Any

from pydantic import BaseModel, Field

from triplane.data.dedupe import Dedupe


class Recipe(BaseModel, extra="forbid", frozen=True):
    """What the bytes of a corpus follow from, besides the content of its inputs."""

    inputs_digest: str
    """Of the names, sizes and versions of the input files."""
    tokenizer_digest: str
    validation_fraction: float
    shard_tokens: int
    text_field: str
    dedupe: Dedupe
    max_document_bytes: int = 256 << 20

    def difference(self, other: Any) -> str:
        """Where `other`, as it was stored, differs."""
        theirs = {"max_document_bytes": 256 << 20, **other} if isinstance(other, dict) else {}
        return ", ".join(f"{key} {theirs.get(key)} and not {value}" for key, value in self if theirs.get(key) != value)


class Counts(BaseModel, extra="forbid"):
    """The size of a split."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    lengths: list[int] = Field(default_factory=list)
    """Entry i: documents of at least 2^i and less than 2^(i + 1) tokens."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each stored token, bos and eos among them."""
        return self.text_bytes / self.tokens

    def add(self, tokens: int, text_bytes: int, documents: int = 1) -> None:
        """Counts a document, or, with -1, counts it no longer."""
        self.documents += documents
        self.tokens += documents * tokens
        self.text_bytes += documents * text_bytes
        power = tokens.bit_length() - 1
        self.lengths += [0] * (power + 1 - len(self.lengths))
        self.lengths[power] += documents


class Rejected(BaseModel, extra="forbid"):
    """Inputs that were left out for one reason."""

    count: int = 0
    first: str
    """The name of the first, and details if there are any."""


class Report(BaseModel, extra="forbid", frozen=True):
    """What `prepare` did."""

    recipe: Recipe
    train: Counts
    validation: Counts
    rejected: dict[str, Rejected]
    """Inputs that are not in the corpus, duplicates among them, by reason; `rejected.jsonl` names every one."""
    reused: bool = Field(default=False, exclude=True)
    """True: the folder held this corpus already."""
