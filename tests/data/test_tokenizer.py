"""The tokenizer gives back every text, and refuses what it can't learn from."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from json_tokenizers import LLAMA3, byte_fallback, byte_level
from small_corpora import Prepared

from triplane.data.blocks import Block
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.tokenizer import Tokenizer
from triplane.data.tokenizer_training import train_tokenizer
from triplane.storage.errors import DataError

_ODD_TEXTS = [
    "",
    " ",
    "  two leading",
    "trailing  ",
    "\t\tx\r\ny\n\n\n",
    "a\0b",
    "🙂\u200d",
    "e\u0301 é",
    "\ufeffx",
    "½ ﬁ",
]


@pytest.mark.parametrize("text", [*_ODD_TEXTS, "\u2581\u2581 \u2581"])
def test_odd_text_comes_back(prepared: Prepared, text: str) -> None:
    assert prepared.tokenizer.decode(prepared.tokenizer.encode(text)) == text


@settings(max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(prepared: Prepared, text: str) -> None:
    assert prepared.tokenizer.decode(prepared.tokenizer.encode(text)) == text


def test_text_cannot_spell_a_control_symbol(prepared: Prepared) -> None:
    ids = prepared.tokenizer.encode("<s>a</s> <unk> <0x0A>" * 3)
    assert not {0, prepared.tokenizer.bos_id, prepared.tokenizer.eos_id} & set(ids)


def test_the_model_does_not_depend_on_the_order_of_documents(prepared: Prepared, tmp_path: Path) -> None:
    paths = [tmp_path / "a.model", tmp_path / "b.model"]
    for path, texts in zip(paths, (prepared.texts, prepared.texts[::-1])):
        train_tokenizer(texts, path, vocab_size=400, sample_bytes=20_000)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != (prepared.folder / "tokenizer.model").read_bytes()  # which saw all bytes


def test_one_huge_document_is_sampled(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a long file\n" for i in range(50_000))
    tokenizer = train_tokenizer([text], tmp_path / "t.model", vocab_size=300, sample_bytes=100_000)
    assert tokenizer.vocab_size == 300


@pytest.mark.parametrize(("texts", "vocab_size"), [([], 400), ([""], 400), (["ab ab"], 8000), (["ab ab"], 100)])
def test_a_vocabulary_that_the_text_cannot_give_is_refused(tmp_path: Path, texts: list[str], vocab_size: int) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(DataError, match=r"t\.model: no .*") as caught:
        train_tokenizer(texts, path, vocab_size)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_tokenizer_that_alters_text_is_refused(tmp_path: Path, prepared: Prepared) -> None:
    path = tmp_path / "lossy.model"
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(prepared.texts), model_writer=model, vocab_size=400, model_type="bpe", minloglevel=2,
            byte_fallback=True, normalization_rule_name="nfkc",
        )  # fmt: skip
    with pytest.raises(DataError, match="readme: the tokenizer alters it at character 2: ' b' comes back as 'b'"):
        open_tokenizer(path).encode_exactly(Block("", "a  b", 0), "readme")


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"t\.model: neither a sentencepiece model nor a Hugging Face tokenizer\.json"):
        open_tokenizer(tmp_path / "t.model")


def test_text_with_few_spaces_has_a_tokenizer(tmp_path: Path) -> None:
    texts = ["\n".join(map(str, range(5000)))]
    with pytest.raises(
        DataError, match=r"no tokenizer of 270 ids from this text: .* take 271; give at least that many"
    ):
        train_tokenizer(texts, tmp_path / "t.model", vocab_size=270)
    tokenizer = train_tokenizer(texts, tmp_path / "t.model", vocab_size=271)
    assert tokenizer.decode(tokenizer.encode("1 2\n3")) == "1 2\n3"


@pytest.fixture(params=["sentencepiece", "byte level", "byte fallback"])
def decoder(request: pytest.FixtureRequest, prepared: Prepared, tmp_path: Path) -> Tokenizer:
    """A tokenizer whose characters may take several ids."""
    if request.param == "sentencepiece":
        return prepared.tokenizer
    if request.param == "byte level":
        return open_tokenizer(byte_level(tmp_path / "tokenizer.json", LLAMA3, prepared.texts))
    return open_tokenizer(byte_fallback(tmp_path / "tokenizer.json"))


def test_text_that_is_decoded_as_it_comes_is_the_whole_text(decoder: Tokenizer) -> None:
    texts = ["12: some words", "東京 🙂 Straße\n\n  x e\u0301 .", "🙂🙂", " a ", "\ufffd b \ufffd", ""]
    for text in texts:
        ids = decoder.encode(text)
        parts = list(decoder.decode_each(ids))
        assert "".join(parts) == decoder.decode(ids) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)


def test_text_is_decoded_as_soon_as_it_is_sure(decoder: Tokenizer) -> None:
    ids, asked = decoder.encode("aeiou 🙂 Straße " * 3), []
    shown = ""
    for part in decoder.decode_each(asked.append(id) or id for id in ids):  # type: ignore[func-returns-value]
        shown += part
        assert part and decoder.decode(asked).startswith(shown)
        waiting = decoder.decode(asked).removeprefix(shown)
        assert waiting.strip(" \ufffd") == "" or len(asked) == len(ids)
    assert len(asked) == len(ids)


def test_a_character_that_ends_early_spoils_nothing(decoder: Tokenizer) -> None:
    ids = decoder.encode("a 語学")[:-1]
    assert "".join(decoder.decode_each(ids)).startswith("a 語")
