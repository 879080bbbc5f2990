"""The exported tokenizer, as transformers reads it, against sentencepiece."""

import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from triplane.data.errors import DataError
from triplane.data.hf_tokenizer import write_hf_tokenizer
from triplane.data.open_tokenizer import open_tokenizer

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
    "<s> </s> <unk> <pad> <s></s> <|end|> a<s>b </s>",
    "<0x41> <0x0A><0xFF>",
    "▁ literal ▁▁ marks ▁x",
    "null \x00 and \x7f and \x1b[0m",
    "aaaaaaaaaaaaaaaaaaaaa ababababababababa =========----======== ((((((())))))) ______",
    "\U0010ffff \ud7ff \ue000",
]
SETTINGS = {
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


def train(path: Path, documents: list[str], **changes) -> Path:
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


@pytest.fixture(scope="module")
def documents():
    return library_sources(2)


@pytest.fixture(scope="module", params=[{}, {"allow_whitespace_only_pieces": True}], ids=["plain", "runs of spaces"])
def tokenizers(request, documents, tmp_path_factory):
    """Sentencepiece's and Hugging Face's tokenizer of the same model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = train(folder / "source.model", documents[: len(documents) // 2], vocab_size=4096, **request.param)
    write_hf_tokenizer(open_tokenizer(model), folder)
    return sentencepiece.SentencePieceProcessor(model_file=str(model)), AutoTokenizer.from_pretrained(folder)


def test_documents_encode_and_decode_alike(tokenizers, documents):
    ours, theirs = tokenizers
    assert len(documents) > 60
    for text in documents:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_odd_texts_encode_and_decode_alike(tokenizers, text):
    ours, theirs = tokenizers
    ids = encode(ours, text)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == ours.decode(ids) == text


def test_random_cuts_encode_and_decode_alike(tokenizers, documents):
    """Starts in the middle of words and of runs of spaces, and odd characters among them."""
    ours, theirs = tokenizers
    draw = random.Random(1)
    for _ in range(500):
        text = draw.choice(documents)
        start = draw.randrange(len(text))
        text = text[start : start + draw.randrange(200)] + draw.choice(ODD_TEXTS)
        ids = encode(ours, text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text


def test_special_tokens_are_known_and_never_read_from_text(tokenizers):
    ours, theirs = tokenizers
    assert len(theirs) == theirs.vocab_size == ours.vocab_size()
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<|end|>": 4}
    assert {piece: ours.piece_to_id(piece) for piece in special} == special
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2, 3)
    assert theirs.convert_tokens_to_ids(list(special)) == list(special.values())
    assert not set(theirs.encode(" ".join(special))) & set(special.values())
    framed = [1, *ours.encode("text"), 2, 4]
    assert theirs.decode(framed, skip_special_tokens=True) == ours.decode(framed) == "text"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"add_dummy_prefix": True}, "add_dummy_prefix=False"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=identity"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=False"),
        ({"byte_fallback": False}, "byte_fallback=True"),
        ({"model_type": "unigram"}, "model_type=bpe"),
        ({"user_defined_symbols": ["<|user|>"]}, "in place of user_defined_symbols"),
    ],
    ids=str,
)
def test_tokenizers_without_an_equal_are_refused(changes, named, documents, tmp_path):
    model = train(tmp_path / "source.model", documents[:3], vocab_size=500, **changes)
    with pytest.raises(DataError, match=named):
        write_hf_tokenizer(open_tokenizer(model), tmp_path / "out")
