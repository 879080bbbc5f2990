"""A Hugging Face tokenizer.json, from preparing a corpus to training on it."""

import json
from pathlib import Path
from typing import Any

import pytest
from json_tokenizers import LLAMA3, QWEN2, byte_level

from triplane.data.corpus import Corpus
from triplane.data.cuts import Even
from triplane.data.loader import IGNORED_TARGET, SequenceDataset
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.plan import StoredPlan
from triplane.data.prepare import prepare
from triplane.storage.errors import DataError

_CONFIGS: dict[str, tuple[str | None, dict[str, Any] | None, str, str]] = {
    "GPT-2": (None, {"model_max_length": 1024}, "<|endoftext|>", "<|endoftext|>"),
    "Qwen2": (QWEN2, {"bos_token": None, "eos_token": "<|endoftext|>"}, "<|endoftext|>", "<|endoftext|>"),
    "Llama 3": (
        LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}},
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "Llama 3 alone": (LLAMA3, None, "<|begin_of_text|>", "<|end_of_text|>"),
}


@pytest.mark.parametrize("name", _CONFIGS)
def test_bos_and_eos_are_found(tmp_path: Path, name: str) -> None:
    pattern, config, bos, eos = _CONFIGS[name]
    path = byte_level(tmp_path / "tokenizer.json", pattern)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path)
    ids = {token["content"]: token["id"] for token in json.loads(path.read_text())["added_tokens"]}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids[bos], ids[eos])
    text = f"a {bos}{eos} b"
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text))
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) == text
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    again = open_tokenizer(copy)
    assert (again.digest, again.bos_id, again.eos_id) == (tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("pattern", [QWEN2, LLAMA3])
def test_a_corpus_of_it_is_read_as_documents(tmp_path: Path, pattern: str) -> None:
    path = byte_level(tmp_path / "tokenizer.json", pattern)
    texts = [f"text {i} <|endoftext|>\n" for i in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(
        [str(tmp_path / "t.jsonl")], tmp_path / "out", path, validation_fraction=0.3, shard_tokens=1000, processes=1
    )
    corpora = Corpus.open_splits(tmp_path / "out")
    tokenizer = corpora[0].open_tokenizer()
    assert tokenizer.digest == open_tokenizer(path).digest
    for corpus in corpora:
        dataset = SequenceDataset([corpus], StoredPlan([Even(corpus.tokens, 40, 40)], 40), document_mask=True)
        batches = [dataset[[i]] for i in range(len(dataset))]
        targets = sum(int((batch.targets_T != IGNORED_TARGET).sum()) for batch in batches)
        # Each document predicts all of its tokens but the first.
        assert targets == corpus.tokens - corpus.documents
        starts = {bound + 40 * i for i, batch in enumerate(batches) for bound in batch.bounds}
        assert starts >= set((corpus.document_lengths().cumsum()[:-1]).tolist())


def test_what_is_no_tokenizer_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content, message in (
        ("", "is empty; give a sentencepiece model"),
        ("[]", "neither a sentencepiece model nor a Hugging Face tokenizer.json"),
        ("{}", "not a readable tokenizer.json"),
        ("{" * 100_000, "not a readable tokenizer.json"),
        ("IQ== 0\nIg== 1\n", "neither a sentencepiece model nor a Hugging Face tokenizer.json"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            open_tokenizer(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"contains neither tokenizer\.json nor tokenizer\.model"):
        open_tokenizer(_empty(tmp_path))
    with pytest.raises(DataError, match="cannot read this tokenizer: No such file"):
        open_tokenizer(tmp_path / "nothing")


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_a_special_token_that_text_can_spell_is_refused(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json", None)
    content = json.loads(path.read_text())
    content["added_tokens"][0]["special"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"<\|endoftext\|>, which starts or ends a text, is also encoded from text"):
        open_tokenizer(path)


def test_a_token_of_the_vocabulary_that_is_not_special_ends_no_text(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json", None, ["words of text\n" * 9])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "\u0120text"}))
    with pytest.raises(DataError, match="\u0120text, which starts or ends a text, is also encoded from text"):
        open_tokenizer(path)


def test_no_special_token_is_taken_for_the_end_by_guess(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json", None)
    path.write_text(path.read_text().replace("<|endoftext|>", "<|fim|>"))
    with pytest.raises(DataError, match="no token ends a text: name one"):
        open_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|fim|>"}))
    assert open_tokenizer(path).eos_id == 0


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
@pytest.mark.parametrize("name", ["<|fim|>", 3, {"content": "<|fim|>"}], ids=str)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_name_that_is_no_token_is_not_passed_over(tmp_path: Path, file: str, name: object, key: str) -> None:
    byte_level(tmp_path / "tokenizer.json", None)
    (tmp_path / file).write_text(json.dumps({key: name}))
    with pytest.raises(DataError, match=rf"{key} is named .*, which is no token of it"):
        open_tokenizer(tmp_path)


def test_keys_that_the_library_does_not_need_may_be_absent(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json", None)
    content = json.loads(path.read_text())
    del content["post_processor"], content["pre_tokenizer"]
    path.write_text(json.dumps(content))
    assert open_tokenizer(path).eos_id == 0
    del content["added_tokens"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match='mark it as "special"'):
        open_tokenizer(path)


def test_truncation_and_dropout_are_off(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json", None)
    before = open_tokenizer(path).encode("some words " * 100)
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    content["padding"] |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    assert open_tokenizer(path).encode("some words " * 100) == before
