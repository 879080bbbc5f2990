"""Text that is encoded in blocks has the ids of the whole text."""

import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from json_tokenizers import LLAMA3, QWEN2, byte_level
from tokenizers import decoders, models, normalizers, trainers

from triplane.data.blocks import UncuttableError
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.tokenizer import Tokenizer


def _library(path: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / path).read_text()


def _texts() -> dict[str, str]:
    draw = random.Random(5)
    chinese = "".join(draw.choices("的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那", k=20_000))
    return {
        "English": _library("pydoc_data/topics.py").replace("\\n", "\n")[:60_000],
        "code": _library("argparse.py"),
        "Chinese": "".join(c + draw.choice(["", "", "", "", ",", "。", "，\n"]) for c in chinese),
        "noise": "".join(map(chr, draw.choices(range(256), k=20_000))),
        "any character": "".join(map(chr, draw.choices([*range(0xD800), *range(0xE000, 0x20000)], k=20_000))),
        "a run": "start " + "a" * 5_000 + " end\n" * 500,
        "spaces": "x = [\n" + " " * 5_000 + "]\n" + "\t\t  y\n\n\n" * 500,
        "one line": _library("argparse.py").replace("\n", " "),
    }


TEXTS = _texts()
SAMPLE = [text[:20_000] for name, text in TEXTS.items() if name != "any character"]


def _sentencepiece(path: Path, **settings: Any) -> Tokenizer:
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            vocab_size=2000,
            byte_fallback=True,
            normalization_rule_name="identity",
            minloglevel=2,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            character_coverage=0.99,
            hard_vocab_limit=False,
            required_chars="\u2581",
            allow_whitespace_only_pieces=True,
            **{"sentence_iterator": iter(SAMPLE), "model_writer": file, **settings},
        )
    return open_tokenizer(path)


def _llama2(path: Path) -> Tokenizer:
    """BPE over the whole text with a leading space, as converted from a sentencepiece model."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, limit_alphabet=300)
    tokenizer.train_from_iterator([line for text in SAMPLE for line in text.split("\n")], trainer)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"][3:]:
        token["special"] = False
    content["added_tokens"] = content["added_tokens"][:3]
    path.write_text(json.dumps(content))
    return open_tokenizer(path)


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    match request.param:
        case "bpe":
            return _sentencepiece(folder / "t.model", model_type="bpe", add_dummy_prefix=False)
        case "bpe with a leading space":
            return _sentencepiece(folder / "t.model", model_type="bpe")
        case "unigram":
            return _sentencepiece(folder / "t.model", model_type="unigram", add_dummy_prefix=False)
        case "llama2":
            return _llama2(folder / "tokenizer.json")
        case name:
            patterns = {"gpt2": None, "llama3": LLAMA3, "qwen2": QWEN2}
            return open_tokenizer(byte_level(folder / "tokenizer.json", patterns[name], SAMPLE))


_KINDS = ["bpe", "bpe with a leading space", "unigram", "llama2", "gpt2", "llama3", "qwen2"]


@pytest.mark.parametrize("tokenizer", _KINDS, indirect=True)
@pytest.mark.parametrize("name", TEXTS)
def test_the_ids_are_those_of_the_whole(tokenizer: Tokenizer, name: str, request: pytest.FixtureRequest) -> None:
    text = TEXTS[name]
    whole = tokenizer.encode(text)
    assert tokenizer.decode(whole) == text
    for size in (300, 1001):
        blocks = list(tokenizer.blocks((text[i : i + 777] for i in range(0, len(text), 777)), block_chars=size))
        assert "".join(block.text for block in blocks) == text and len(blocks) > 1
        ids = [id for block in blocks for id in tokenizer.encode_exactly(block, name).tolist()]
        if "unigram" in request.node.callspec.id:
            # Sentencepiece adds up single-precision scores from the start of the text, and so settles ties by rounding.
            scores = [sum(map(_score(tokenizer), each)) for each in (ids, whole)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-6)
        else:
            assert ids == whole


def _score(tokenizer: Tokenizer) -> Callable[[int], float]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    return processor.get_score


@pytest.mark.parametrize("tokenizer", _KINDS, indirect=True)
def test_a_run_without_end_is_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(UncuttableError, match=r"no place to cut it: .* characters from character 0 on"):
        list(tokenizer.blocks("a" * (1 << 16) for _ in range(80)))
