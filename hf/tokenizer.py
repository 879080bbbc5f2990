"""Writes a tokenizer as the files that Hugging Face's libraries read."""

import json
import re
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from triplane.data.json_tokenizer import CONFIG_NAME, JSON_NAME
from triplane.data.sentencepiece_tokenizer import SENTENCEPIECE_NAME
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError

Piece = ModelProto.SentencePiece

_SPACE = "▁"
"""Sentencepiece's mark for a space inside its pieces. Here a space stays one, so that this character,
should a text hold it, is neither read nor given back as a space."""

_AS_IT_STANDS = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it stands; others have rules of their own."""


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and what else there is into `folder`.

    `transformers.AutoTokenizer` then gives the tokens of `tokenizer` and the same text back, and knows that the model
    reads `context` tokens. Raises DataError if the format cannot express the tokenizer.
    """
    files = hf_files(tokenizer)
    config = {key: value for key, value in json.loads(files[CONFIG_NAME]).items() if key != "auto_map"}  # names code
    config |= {"tokenizer_class": _AS_IT_STANDS, "model_max_length": context}
    for name, content in {**files, CONFIG_NAME: (json.dumps(config, indent=1) + "\n").encode()}.items():
        (folder / name).write_bytes(content)


def hf_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Names and contents of its files in a Hugging Face folder; DataError if the format cannot express it."""
    if JSON_NAME in tokenizer.files:
        return dict(tokenizer.files)
    return _converted(tokenizer.files[SENTENCEPIECE_NAME])


def tokenizer_class(files: dict[str, bytes]) -> str | None:
    """Returns the class that a tokenizer's own files ask for."""
    named = json.loads(files[CONFIG_NAME]).get("tokenizer_class")
    return named.removesuffix("Fast") if isinstance(named, str) else None


def _converted(model_file: bytes) -> dict[str, bytes]:
    """The files for a sentencepiece model, which gives the same tokens (for a literal "▁", its bytes) after a bos.

    A unigram model may give them in another order where two ways score alike to the last bit.

    Control symbols get names that occur in no text, such as `<|eos|>` for `</s>`, which is an HTML tag: clients that
    tune a model put them into its text. Raises DataError unless the model has byte fallback and takes text as it is.
    """
    model = ModelProto.FromString(model_file)
    _check(model)
    return {SENTENCEPIECE_NAME: model_file, JSON_NAME: _text(_tokenizer(model)), CONFIG_NAME: _text(_config(model))}


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _check(model: ModelProto) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    bpe, symbols = trainer.model_type == trainer.BPE, any(p.type == Piece.USER_DEFINED for p in model.pieces)
    needed = {
        "model_type=bpe or unigram": bpe or trainer.model_type == trainer.UNIGRAM,
        "byte_fallback=True": trainer.byte_fallback,
        "normalization_rule_name=identity": not normalizer.precompiled_charsmap,
        "remove_extra_whitespaces=False": not normalizer.remove_extra_whitespaces,
        "treat_whitespace_as_suffix=False": not trainer.treat_whitespace_as_suffix,
        "▁ for each space in user_defined_symbols": all(" " not in p.piece for p in model.pieces),
        "control_symbols in place of user_defined_symbols, which a prefix or a unigram model treats otherwise": (
            not symbols or (bpe and not normalizer.add_dummy_prefix)
        ),
    }
    if wrong := [setting for setting, holds in needed.items() if not holds]:
        raise DataError(f"The tokenizer has no equal in Hugging Face's format; train it with {', '.join(wrong)}.")


def _names(model: ModelProto) -> list[str]:
    """Returns the name of each id in tokenizer.json."""
    trainer = model.trainer_spec
    roles = {trainer.unk_id: "unk", trainer.bos_id: "bos", trainer.eos_id: "eos", trainer.pad_id: "pad"}
    names = [piece.piece.replace(_SPACE, " ") for piece in model.pieces]
    taken = set(names)
    for number, role in roles.items():
        if number < 0:
            continue
        name = f"<|{role}|>"
        while name in taken:
            name = f"<|{name[1:-1]}|>"
        names[number] = name
    return names


def _tokenizer(model: ModelProto) -> dict[str, Any]:
    """The content of tokenizer.json."""
    names, trainer = _names(model), model.trainer_spec
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {Piece.CONTROL: True, Piece.UNKNOWN: True, Piece.USER_DEFINED: False}
    prefix = model.normalizer_spec.add_dummy_prefix
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": names[i], **flags, "special": added[p.type]}
            for i, p in enumerate(model.pieces)
            if p.type in added
        ],
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": None if trainer.model_type == trainer.BPE else _apart(model, names),
        "post_processor": _after_bos(names[trainer.bos_id], trainer.bos_id),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model, names) if trainer.model_type == trainer.BPE else _unigram(model, names),
    }


def _apart(model: ModelProto, names: list[str]) -> dict[str, Any]:
    """Cuts text that spells out a special token or a byte's `<0x41>`, which a unigram model would read as that token.

    The cut is where no piece joins the two characters, so that the tokens of all other text stay the same.
    """
    pairs = _pairs(model)
    suffixes: dict[str, list[str]] = {}
    for name in (names[i] for i, p in enumerate(model.pieces) if p.type in (Piece.CONTROL, Piece.UNKNOWN, Piece.BYTE)):
        cut = _cut(name, pairs)
        if cut is None:
            raise DataError(f"The tokenizer has pieces within {name}, which its text could spell out; train it anew.")
        suffixes.setdefault(re.escape(name[:cut]), []).append(re.escape(name[cut:]))
    pattern = "|".join(f"(?<={prefix})(?:{'|'.join(ends)})" for prefix, ends in suffixes.items())
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "MergedWithNext", "invert": False}


def _pairs(model: ModelProto) -> set[str]:
    """The characters that stand side by side in a piece of text."""
    pieces = (p.piece.replace(_SPACE, " ") for p in model.pieces if p.type == Piece.NORMAL)
    return {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}


def _cut(name: str, pairs: set[str]) -> int | None:
    return next((i for i in range(1, len(name)) if name[i - 1 : i + 1] not in pairs), None)


def _after_bos(bos: str, bos_id: int) -> dict[str, Any]:
    """Every text of the training began with bos."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _bpe(model: ModelProto, names: list[str]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": names[model.trainer_spec.unk_id],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": _merges(model),
    }


def _merges(model: ModelProto) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best first.

    Sentencepiece stores only the pieces: it joins the neighbours whose union scores highest.
    """
    normal = [p for p in model.pieces if p.type == Piece.NORMAL]
    ranks = {p.piece.replace(_SPACE, " "): i for i, p in enumerate(sorted(normal, key=lambda p: -p.score))}
    splits = ([piece[:cut], piece[cut:]] for piece in ranks for cut in range(1, len(piece)))
    return [[left, right] for left, right in splits if left in ranks and right in ranks]


def _unigram(model: ModelProto, names: list[str]) -> dict[str, Any]:
    """Tokens that no text holds score as low as the worst that one may, which what is unknown is measured by."""
    worst = min(p.score for p in model.pieces if p.type == Piece.NORMAL)
    scores = [p.score if p.type == Piece.NORMAL else worst for p in model.pieces]
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "vocab": [[name, score] for name, score in zip(names, scores)],
        "byte_fallback": True,
    }


def _config(model: ModelProto) -> dict[str, Any]:
    """The content of tokenizer_config.json.

    Without a pad token it is unk, which byte fallback never gives: as eos it would be masked from the loss of a tuning.
    """
    trainer, names = model.trainer_spec, _names(model)
    return {
        "tokenizer_class": _AS_IT_STANDS,
        "bos_token": names[trainer.bos_id],
        "eos_token": names[trainer.eos_id],
        "pad_token": names[trainer.pad_id if trainer.pad_id >= 0 else trainer.unk_id],
        "unk_token": names[trainer.unk_id],
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
    }
