"""The exported tokenizer, as transformers reads it, against sentencepiece."""

import random
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from triplane.data.open_tokenizer import open_tokenizer
from triplane.hf.tokenizer import write_hf_tokenizer
from triplane.storage.errors import DataError

ODD_TEXTS = [
    "",
    " ",
    "a",
    "\n",
    "\t\tx = 1\n",
    "  two leading spaces",
    "trailing spaces   ",
    "runs" + " " * 40 + "of" + " " * 7 + "spaces" + " \n \n  \n",
    "carriage\r\nreturn\rand\x0bvertical\x0ctab",
    "digits 0 12 345 6789 10.25e-3 0x1F 1,000,000",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 and 漢字 العربية ไทย é e\u0301",
    "ﬁ ligature, ① circled, full　width，ＡＢＣ, soft\u00adhyphen, \u200bzero width, \ufeffmark",
    "<s> </s> <unk> <pad> <s></s> <|endofit|> a<s>b </s>",
    "<0x41> <0x0A><0xFF>",
    "▁ literal ▁▁ marks ▁x",
    "null \x00 and \x7f and \x1b[0m",
    "aaaaaaaaaaaaaaaaaaaaa ababababababababa =========----======== ((((((())))))) ______",
    "\U0010ffff \ud7ff \ue000",
]
SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "control_symbols": ["<|end|>"],
    "pad_id": 3,
    "max_sentence_length": 1 << 20,
    "num_threads": 1,
    "minloglevel": 2,
}


Tokenizers = tuple[sentencepiece.SentencePieceProcessor, Any]
"""Sentencepiece's and Hugging Face's of one model."""


def library_sources(megabytes: float) -> list[str]:
    """Python's own library, a random sample in a fixed order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("[a-e]*/*.py")
    )
    random.Random(0).shuffle(paths)
    texts, size = [], 0
    for path in paths:
        if size > megabytes * 1e6:
            break
        texts.append(path.read_text(encoding="utf-8"))
        size += path.stat().st_size
    return texts


def train(path: Path, documents: list[str], **changes: Any) -> Path:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents), model_writer=file, **(SETTINGS | changes)
        )
    return path


def encode(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Sentencepiece's ids, but a literal "▁", which it reads as a space, as its bytes."""
    parts = [processor.encode(part) for part in text.split("▁")]
    mark = [processor.piece_to_id(piece) for piece in ("<0xE2>", "<0x96>", "<0x81>")]
    return parts[0] + [i for part in parts[1:] for i in mark + part]


def read(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Their ids after bos, which comes once."""
    first, *ids = tokenizer.encode(text)
    assert first == tokenizer.bos_token_id and first not in ids
    return ids


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return library_sources(2)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "runs of spaces": {"allow_whitespace_only_pieces": True},
    "a space before the text": {"add_dummy_prefix": True},
    "unigram": {"model_type": "unigram"},
    "unigram, a space before": {"model_type": "unigram", "add_dummy_prefix": True},
    "symbols": {"user_defined_symbols": ["<|user|>", "\t", "▁▁", "▁▁▁▁", "def"]},
}


@pytest.fixture(scope="module", params=list(KINDS.values()), ids=list(KINDS))
def tokenizers(
    request: pytest.FixtureRequest, documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Tokenizers:
    """Sentencepiece's and Hugging Face's tokenizer of the same model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = train(folder / "source.model", documents[: len(documents) // 4], vocab_size=2048, **request.param)
    write_hf_tokenizer(open_tokenizer(model), folder, 64)
    return sentencepiece.SentencePieceProcessor(model_file=str(model)), AutoTokenizer.from_pretrained(folder)


def assert_alike(ours: sentencepiece.SentencePieceProcessor, theirs: PreTrainedTokenizerFast, text: str) -> None:
    ids, found = encode(ours, text), read(theirs, text)
    if is_unigram(theirs):  # ways that score alike are told apart by rounding; they differ in order alone
        assert sorted(found) == sorted(ids), text
    else:
        assert found == ids, text
    assert theirs.decode(found) == text


def is_unigram(tokenizer: PreTrainedTokenizerFast) -> bool:
    return type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"


def test_documents_encode_and_decode_alike(tokenizers: Tokenizers, documents: list[str]) -> None:
    ours, theirs = tokenizers
    assert len(documents) > 60
    for text in documents:
        for part in text.splitlines(keepends=True) if is_unigram(theirs) else [text]:
            assert_alike(ours, theirs, part)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_odd_texts_encode_and_decode_alike(tokenizers: Tokenizers, text: str) -> None:
    ours, theirs = tokenizers
    ids = encode(ours, text)
    if ours.decode(ids) != text:
        pytest.skip("sentencepiece puts a space after each mark, so that no corpus holds such a text")
    assert read(theirs, text) == ids
    assert theirs.decode(ids) == ours.decode(ids) == text


def test_random_cuts_encode_and_decode_alike(tokenizers: Tokenizers, documents: list[str]) -> None:
    """Starts in the middle of words and of runs of spaces, and odd characters among them."""
    ours, theirs = tokenizers
    draw = random.Random(1)
    for _ in range(500):
        text = draw.choice(documents)
        start = draw.randrange(len(text))
        text = text[start : start + draw.randrange(200)] + draw.choice(ODD_TEXTS)
        if ours.decode(encode(ours, text)) == text:  # else it is in no corpus: a mark before which comes a space
            assert_alike(ours, theirs, text)


def test_special_tokens_survive_tuning_and_the_sentencepiece_names_are_text(tokenizers: Tokenizers) -> None:
    ours, theirs = tokenizers
    assert len(theirs) == theirs.vocab_size == ours.vocab_size()
    special = {"<|unk|>": 0, "<|bos|>": 1, "<|eos|>": 2, "<|pad|>": 3, "<|end|>": 4}
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2, 3)
    assert theirs.convert_tokens_to_ids(list(special)) == list(special.values())
    for token, number in special.items():
        assert number in theirs.encode(f"text{token}text", add_special_tokens=False)
    assert not set(read(theirs, "<s> </s> <unk> <pad> a<s>b")) & set(special.values())
    assert theirs.encode("text" + theirs.eos_token)[-1] == 2  # as a tuning appends it
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    assert max(theirs.encode("a<|im_start|>b")) >= ours.vocab_size()
    framed = [1, *ours.encode("text"), 2, 4]
    assert theirs.decode(framed, skip_special_tokens=True) == ours.decode(framed) == "text"


def test_an_exported_tokenizer_can_prepare_a_corpus(tokenizers: Tokenizers) -> None:
    ours, theirs = tokenizers
    again = open_tokenizer(Path(theirs.name_or_path) / "tokenizer.json")
    for text in ("<|bos|> in <|eos|> text <|unk|><|end|>", "a <0x41> b <0x0A>", *ODD_TEXTS):
        if ours.decode(encode(ours, text)) == text:
            assert sorted(again.encode(text)) == sorted(encode(ours, text)), text
            assert again.decode(again.encode(text)) == text


def test_texts_are_padded_and_cut_to_the_context(tokenizers: Tokenizers) -> None:
    _, theirs = tokenizers
    padded = theirs(["a", "a b c d e f"], padding=True)
    assert padded["input_ids"][0][-1] == theirs.pad_token_id != theirs.eos_token_id
    assert len(theirs("word " * 500, truncation=True)["input_ids"]) == theirs.model_max_length == 64


def test_without_a_pad_token_what_is_unknown_pads(documents: list[str], tmp_path: Path) -> None:
    model = train(tmp_path / "source.model", documents[:3], vocab_size=500, pad_id=-1)
    write_hf_tokenizer(open_tokenizer(model), tmp_path, 64)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 0


def test_a_name_that_the_vocabulary_holds_is_not_given_to_a_special_token(documents: list[str], tmp_path: Path) -> None:
    model = train(tmp_path / "source.model", documents[:3], vocab_size=500, user_defined_symbols=["<|eos|>"])
    write_hf_tokenizer(open_tokenizer(model), tmp_path, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == 2 and theirs.encode("<|eos|>")[-1] > 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=identity"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=False"),
        ({"byte_fallback": False}, "byte_fallback=True"),
        ({"model_type": "char", "vocab_size": 300}, "model_type=bpe or unigram"),
        ({"user_defined_symbols": ["<|user|>"], "add_dummy_prefix": True}, "in place of user_defined_symbols"),
        ({"user_defined_symbols": ["<|user|>"], "model_type": "unigram"}, "in place of user_defined_symbols"),
    ],
    ids=str,
)
def test_tokenizers_without_an_equal_are_refused(
    changes: dict[str, Any], named: str, documents: list[str], tmp_path: Path
) -> None:
    model = train(tmp_path / "source.model", documents[:3], **{"vocab_size": 500, **changes})
    with pytest.raises(DataError, match=named):
        write_hf_tokenizer(open_tokenizer(model), tmp_path / "out", 64)
