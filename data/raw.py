"""Turns foreign WebDataset tars into a corpus, once, in a cache."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.prepare import Progress, prepare
from triplane.data.sources import find_files
from triplane.storage.errors import DataError


def ensure_corpus(
    tars: Sequence[str],
    cache: Path,
    tokenizer: Path,
    *,
    processes: int,
    text_field: str = "text",
    validation_fraction: float = 0.02,
    shard_tokens: int = 1 << 24,
    progress: Callable[[Progress], object] | None = None,
) -> Path:
    """Returns the folder in `cache` with the corpus of `tars` (paths, URLs, patterns); writes it first if missing.

    A sample's text is its `txt` member, or the `text_field` of its `json` member. The folder is named after the names,
    sizes and versions of the tars, the tokenizer and the settings. Of concurrent callers on any machines, one writes
    while the others wait; if it is killed, another takes over. Raises DataError as `prepare`.
    """
    files = find_files(tars, lambda rejection: None)
    if others := [file.name for file in files if file.format != ".tar"]:
        raise DataError(f"{others[0]}: not a tar: prepare it with `triplane prepare` and name the corpus")
    key = [open_tokenizer(tokenizer).digest, text_field, validation_fraction, shard_tokens]
    key += [(file.path, file.size, file.version) for file in files]
    folder = cache / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    prepare(
        [file.path for file in files],
        folder,
        tokenizer,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        processes=processes,
        progress=progress,
        text_field=text_field,
        wait=True,
    )
    return folder
