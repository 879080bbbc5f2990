"""A small corpus of odd documents: several shards, several blocks in a shard."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from triplane.data.corpus import Corpus
from triplane.data.prepare import prepare
from triplane.data.report import Report
from triplane.data.tokenizer import Tokenizer
from triplane.data.tokenizer_training import train_tokenizer

_ODD_WORDS = ["<s>", "</s>", "2026", "x=1", "Straße", "東京", "🙂", "\u2581", "\t", "\r\n", "\n\n", "", "e\u0301"]


@dataclass(frozen=True, repr=False)
class Prepared:
    """A corpus on the disk and what it was made of."""

    folder: Path
    source: Path
    texts: list[str]
    report: Report
    tokenizer: Tokenizer

    @property
    def tokenizer_path(self) -> Path:
        return self.source.parent / "tokenizer.model"

    @property
    def train(self) -> Corpus:
        return Corpus(self.folder / "train")

    @property
    def validation(self) -> Corpus:
        return Corpus(self.folder / "validation")


def build_corpus(folder: Path) -> Prepared:
    """1,500 documents of 2 to 200 tokens in `folder`; a tenth of them are for validation."""
    draw = random.Random(1)
    words = ["".join(draw.choices("aeiounrst", k=draw.randint(1, 9))) for _ in range(300)] + _ODD_WORDS
    texts = [f"{i}: " + " ".join(draw.choices(words, k=draw.randint(1, 80))) for i in range(1500)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", vocab_size=400)
    report = prepare(
        [str(source)],
        folder / "out",
        folder / "tokenizer.model",
        validation_fraction=0.1,
        shard_tokens=40_000,
        processes=2,
    )
    return Prepared(folder / "out", source, texts, report, tokenizer)
