"""Writes a tokenizer as the files that Hugging Face's libraries read."""

import json
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from triplane.data.errors import DataError
from triplane.data.tokenizer import Tokenizer

Piece = ModelProto.SentencePiece

_SPACE = "▁"
"""How sentencepiece writes a space inside its pieces. Here a space stays one, so that this character,
should a text hold it, is neither read nor given back as a space."""


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and what else there is into `folder`.

    `transformers.AutoTokenizer` then gives the tokens of `tokenizer` and the same text back. Raises DataError if
    the format cannot express the tokenizer.
    """
    for name, content in tokenizer.hf_files().items():
        (folder / name).write_bytes(content)


def converted(model_file: bytes) -> dict[str, bytes]:
    """The files for a sentencepiece model, which gives the same tokens (for a literal "▁", its bytes).

    A special token that is spelled out in text stays text. Raises DataError unless the model is a BPE with byte
    fallback that takes text as it is.
    """
    model = ModelProto.FromString(model_file)
    _check(model)
    texts = {"tokenizer.json": _tokenizer(model), "tokenizer_config.json": _config(model)}
    return {
        "tokenizer.model": model_file,
        **{name: (json.dumps(text, ensure_ascii=False, indent=1) + "\n").encode() for name, text in texts.items()},
    }


def _check(model: ModelProto) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    needed = {
        "model_type=bpe": trainer.model_type == trainer.BPE,
        "byte_fallback=True": trainer.byte_fallback,
        "normalization_rule_name=identity": not normalizer.precompiled_charsmap,
        "add_dummy_prefix=False": not normalizer.add_dummy_prefix,
        "remove_extra_whitespaces=False": not normalizer.remove_extra_whitespaces,
        "control_symbols in place of user_defined_symbols": all(p.type != Piece.USER_DEFINED for p in model.pieces),
    }
    if wrong := [setting for setting, holds in needed.items() if not holds]:
        raise DataError(f"The tokenizer has no equal in Hugging Face's format; train it with {', '.join(wrong)}.")


def _tokenizer(model: ModelProto) -> dict[str, Any]:
    """The content of tokenizer.json."""
    special = [(i, p.piece) for i, p in enumerate(model.pieces) if p.type in (Piece.CONTROL, Piece.UNKNOWN)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in special],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.trainer_spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {p.piece.replace(_SPACE, " "): i for i, p in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _merges(model: ModelProto) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best first.

    Sentencepiece stores only the pieces: it joins the neighbours whose union scores highest.
    """
    normal = [p for p in model.pieces if p.type == Piece.NORMAL]
    ranks = {p.piece.replace(_SPACE, " "): i for i, p in enumerate(sorted(normal, key=lambda p: -p.score))}
    splits = ([piece[:cut], piece[cut:]] for piece in ranks for cut in range(1, len(piece)))
    return [[left, right] for left, right in splits if left in ranks and right in ranks]


def _config(model: ModelProto) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    trainer = model.trainer_spec
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it stands
        "bos_token": trainer.bos_piece if trainer.bos_id >= 0 else None,
        "eos_token": trainer.eos_piece if trainer.eos_id >= 0 else None,
        "pad_token": trainer.pad_piece if trainer.pad_id >= 0 else None,
        "unk_token": trainer.unk_piece,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # else "<s>" in a text would become the token
    }
