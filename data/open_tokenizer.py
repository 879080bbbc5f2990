"""Opens a tokenizer from its file, its folder, or the files' contents."""

from collections.abc import Mapping
from pathlib import Path

from triplane.data.json_tokenizer import CONFIG_NAME, JSON_NAME, MAP_NAME, JsonTokenizer
from triplane.data.sentencepiece_tokenizer import SENTENCEPIECE_NAME, SentencePieceTokenizer
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError

_MOST_BYTES = 1 << 28


def open_tokenizer(path: Path) -> Tokenizer:
    """Opens a sentencepiece model, a Hugging Face `tokenizer.json`, or a folder with one of them.

    Raises DataError if `path` is none of these, or if the tokenizer has no bos or eos.
    """
    if path.is_dir():
        found = [path / name for name in (JSON_NAME, SENTENCEPIECE_NAME) if (path / name).exists()]
        if not found:
            raise DataError(f"{path}: contains neither {JSON_NAME} nor {SENTENCEPIECE_NAME}")
        path = found[0]
    content = _read(path)
    if not content.lstrip().startswith(b"{"):
        return tokenizer_of({SENTENCEPIECE_NAME: content}, path)
    beside = {name: path.with_name(name) for name in (CONFIG_NAME, MAP_NAME)}
    return tokenizer_of(
        {JSON_NAME: content, **{name: _read(other) for name, other in beside.items() if other.exists()}}, path
    )


def tokenizer_of(files: Mapping[str, bytes], where: object) -> Tokenizer:
    """Opens the tokenizer with these `Tokenizer.files`; raises DataError if it is unreadable."""
    if JSON_NAME in files:
        return JsonTokenizer(files, str(where))
    if SENTENCEPIECE_NAME not in files:
        raise DataError(f"{where}: neither {JSON_NAME} nor {SENTENCEPIECE_NAME} is among the tokenizer's files")
    return SentencePieceTokenizer(files[SENTENCEPIECE_NAME], str(where))


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot read this tokenizer: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise DataError(f"{path}: more than {_MOST_BYTES:,} bytes, which no tokenizer has")
    return content
