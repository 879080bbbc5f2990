"""Wraps a Hugging Face `tokenizer.json` as a tokenizer, using the `tokenizers` library."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from triplane.data.blocks import AHEAD_CHARS, SafePairs
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError

JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
MAP_NAME = "special_tokens_map.json"

_KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""End-of-text tokens of well-known tokenizers, for when no file names one."""
_CUTS = [re.compile(cut) for cut in (r"(?<=\S\n)(?=\S)", r"(?<=\w)(?=\s)", r"(?<=\w)(?=[^\w\s])")]
"""Places where common rules split words, best first: line ends, words before spaces, other ends of words."""
_TRIES = 32
_SEARCHED_CHARS = 1 << 13


class JsonTokenizer(Tokenizer):
    """Treats special tokens that are spelled out in text as text."""

    context_chars = AHEAD_CHARS // 4

    def __init__(self, files: Mapping[str, bytes], where: str):
        """`files` are JSON_NAME and, if they exist, CONFIG_NAME and MAP_NAME. Raises DataError, which names `where`,
        if the library cannot read them, or if no token ends a text."""
        try:
            self._library = tokenizers.Tokenizer.from_buffer(files[JSON_NAME])
        except ValueError as error:
            raise DataError(f"{where}: not a readable tokenizer.json: {' '.join(str(error).split())}") from error
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        if getattr(self._library.model, "dropout", None):
            self._library.model.dropout = None
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        content = json.loads(self._library.to_str())  # includes keys that the file may omit
        config, map_ = (_object(files.get(name, b"{}"), f"{where}: {name}") for name in (CONFIG_NAME, MAP_NAME))
        special = {token["content"] for token in content["added_tokens"] if token["special"]}
        begin, end = _template_ends(content["post_processor"])
        named: dict[str, Any] = {key: _named(config, key) or _named(map_, key) for key in ("bos_token", "eos_token")}
        for key, name in named.items():
            if name is not None and not (isinstance(name, str) and name in vocabulary):
                raise DataError(f"{where}: {key} is named {name!r}, which is no token of it; name one that is")
        eos = _first(vocabulary, named["eos_token"], end, *_KNOWN_EOS)
        if eos is None:
            raise DataError(
                f'{where}: no token ends a text: name one as "eos_token" in a {CONFIG_NAME} beside tokenizer.json'
            )
        bos = _first(vocabulary, named["bos_token"], begin) or eos
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]
        for token in (bos, eos):
            if token not in special or vocabulary[token] in self.encode_whole(token):
                raise DataError(
                    f"{where}: {token}, which starts or ends a text, is also encoded from text that spells it out: "
                    'mark it as "special" among the "added_tokens" of tokenizer.json'
                )
        told = json.dumps({**config, "bos_token": bos, "eos_token": eos}, indent=1) + "\n"
        self.files = {JSON_NAME: files[JSON_NAME], CONFIG_NAME: told.encode()}
        self.digest = hashlib.sha256(files[JSON_NAME] + f"{bos}\n{eos}".encode()).hexdigest()
        # Without words, merges may span the whole text: a cut must be where no token could be.
        self._pairs = None if content["pre_tokenizer"] else SafePairs(vocabulary)

    def encode_whole(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=True)

    def find_cut(self, text: str, start: int, stop: int) -> int | None:
        if self._pairs:
            stop = self._pairs.find_cut(text, start, stop) or start
            return stop if stop > start and self._is_unseen(text, stop) else None
        return next((cut for cut in _candidates(text, start, stop) if self._is_unseen(text, cut)), None)

    def _is_unseen(self, text: str, cut: int) -> bool:
        """Returns whether the cut leaves the tokens around it unchanged."""
        before = self.encode_whole(text[max(0, cut - self.context_chars) : cut])
        around = self.encode_whole(text[max(0, cut - self.context_chars) : cut + AHEAD_CHARS])
        return around[: len(before)] == before


def _candidates(text: str, start: int, stop: int) -> Iterator[int]:
    first = max(start, stop - _SEARCHED_CHARS)
    for pattern in _CUTS:
        found = [match.start() for match in pattern.finditer(text, first, stop + 1) if first < match.start() <= stop]
        yield from found[: -_TRIES - 1 : -1]


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object")
    return value


def _named(config: Mapping[str, Any], key: str) -> object:
    """Returns the token's text, which may be nested in an object, or None."""
    token = config.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token


def _template_ends(post_processor: Any) -> tuple[str | None, str | None]:
    """Returns the tokens that the template for one text puts before and after it."""
    if not isinstance(post_processor, dict):
        return None, None
    for processor in (post_processor, *post_processor.get("processors", ())):
        template = processor.get("single") or []
        kinds = [next(iter(part)) for part in template]
        if "Sequence" in kinds:
            tokens = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in template]
            at = kinds.index("Sequence")
            return (tokens[0] if at else None), (tokens[-1] if at < len(kinds) - 1 else None)
    return None, None


def _first(vocabulary: Mapping[str, int], *tokens: str | None) -> str | None:
    return next((token for token in tokens if token is not None and token in vocabulary), None)
