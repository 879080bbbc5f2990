"""Exports as transformers reads them, and planted errors that must not be published."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from json_tokenizers import QWEN2, byte_level
from safetensors.torch import load_file
from small_models import packed, random_documents, random_weights, small_config, with_gate_and_up_swapped
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from triplane.checkpoint.parent import Parent
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.tokenizer import Tokenizer
from triplane.hf import export as export_module
from triplane.hf import verify
from triplane.hf import weights as hf_weights
from triplane.hf.export import export
from triplane.hf.families.table import FAMILIES
from triplane.model.build import load_model
from triplane.model.generate import generate, next_logits
from triplane.model.parts.rotary import LinearScaling, Llama3Scaling
from triplane.storage.errors import CheckpointError, ModelError

VOCAB = 400
LLAMA3 = Llama3Scaling(kind="llama3", factor=4, low_freq_factor=1, high_freq_factor=4, original_seq_len=128)
PROVENANCE = {"run": "first", "step": "1000", "corpus": "sha256:0123", "layout": "tp 2, pp 2, dp 2"}
export_fp32 = partial(export, context=64, dtype=torch.float32, provenance={})


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([Path(hf_weights.__file__).read_text()]),
            model_writer=file,
            vocab_size=VOCAB,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            minloglevel=2,
        )
    return path


@pytest.fixture
def publish(tokenizer_model: Path, tmp_path: Path) -> Callable[..., Any]:
    """Exports a small model to `tmp_path / "model"`; returns its config, weights, report and folder."""

    def run(dtype: torch.dtype = torch.float32, weights: dict[str, Tensor] | None = None, **changes: Any) -> Any:
        config = small_config(vocab_size=VOCAB, **changes)
        weights = random_weights(config) if weights is None else weights
        tokenizer, out = open_tokenizer(tokenizer_model), tmp_path / "model"
        report = export(weights, config, out, context=64, tokenizer=tokenizer, dtype=dtype, provenance=PROVENANCE)
        return config, weights, report, out

    return run


VARIANTS = {
    "plain": {},
    "biases": {"qkv_bias": True},
    "tied": {"tie_embeddings": True},
    "llama3": {"rope_scaling": LLAMA3},
    "linear, wide heads": {"rope_scaling": LinearScaling(kind="linear", factor=3), "head_dim": 16},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_computes_our_logits(
    publish: Callable[..., Any], changes: dict[str, Any], dtype: torch.dtype
) -> None:
    config, weights, report, folder = publish(dtype, **changes)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
    sequences = random_documents(config, [60, 60], seed=1)
    ours = load_model(config, weights, dtype)
    with torch.no_grad():
        for computed_in, tolerance in {dtype: 0.2, torch.float32: 1e-5}.items():
            ours_TV = ours.to(computed_in).logits(packed(sequences))
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=computed_in)
            theirs_TV = theirs(torch.stack(sequences)).logits.flatten(0, 1)
            torch.testing.assert_close(ours_TV, theirs_TV, atol=tolerance, rtol=0)
    assert report.difference == 0
    assert report.transformers_difference < 1e-5 < report.largest_logit


GPT2_WITHOUT_BIASES = {
    "norm": {"kind": "layer", "bias": False},
    "positions": {"kind": "learned", "max_seq_len": 64},
    "feed_forward": {"kind": "plain", "activation": "gelu_tanh", "hidden_dim": 80, "bias": False},
    "tie_embeddings": True,
    "n_kv_heads": 6,
}
ZEROS = {
    "queries, keys and values": ("llama", {"qkv_bias": True}, "model.layers.1.self_attn.o_proj.bias"),
    "none": ("gpt2", GPT2_WITHOUT_BIASES, "transformer.h.1.attn.c_attn.bias"),
}


@pytest.mark.parametrize(("family", "changes", "bias"), ZEROS.values(), ids=ZEROS.keys())
def test_biases_that_a_model_lacks_are_zeros_of_a_common_family(
    family: str, changes: dict[str, Any], bias: str, publish: Callable[..., Any]
) -> None:
    *_, report, folder = publish(**changes)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    assert not load_file(folder / "model.safetensors")[bias].any()
    assert report.difference == 0
    assert report.transformers_difference < 1e-5 < report.largest_logit


def test_transformers_generates_the_same_text(publish: Callable[..., Any], tokenizer_model: Path) -> None:
    config, weights, _, folder = publish()
    prompt = AutoTokenizer.from_pretrained(folder).encode("The tokens")
    assert prompt == [1, *sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).encode("The tokens")]
    reference: Any = AutoModelForCausalLM.from_pretrained(folder)
    theirs = reference.generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = generate(
        next_logits(load_model(config, weights, torch.float32)),
        prompt,
        max_new_tokens=16,
        temperature=0,
        top_k=None,
        seed=0,
        eos_id=None,
    )
    assert theirs[0, len(prompt) :].tolist() == list(ours)


def test_the_folder_is_whole_and_says_where_it_came_from(publish: Callable[..., Any], tmp_path: Path) -> None:
    *_, report, folder = publish(torch.bfloat16)
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    }
    card = (folder / "README.md").read_text()
    assert all(f"| {key} | {value} |" in card for key, value in PROVENANCE.items())
    assert str(report) in card
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_large_models_are_sharded(publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_weights, "_SHARD_BYTES", 80_000)
    _, weights, report, folder = publish()
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(weight.numel() for weight in weights.values())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(file.stat().st_size < 85_000 for file in files)
    assert report.transformers_difference < 1e-5


def permuted_rows(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """The old rotary layout: pairs (2i, 2i + 1) of each query head."""
    name = "model.layers.1.self_attn.q_proj.weight"
    q = tensors[name].view(6, 2, 4, 48).transpose(1, 2).reshape(48, 48)
    hf_weights_save(tensors | {name: q.contiguous()}, path, metadata=metadata)


hf_weights_save = hf_weights.save_file


def altered_config(**changes: Any) -> Callable[..., Any]:
    """Returns a writer of a config.json that is right but for `changes`."""
    right = export_module.hf_config

    def wrong(*args: Any, **options: Any) -> Any:
        return right(*args, **options) | changes

    return wrong


WRONG_BASE = {"rope_type": "default", "rope_theta": 2e4}
X_FOR_Y = {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}
PLANTED = {
    "permuted query rows": (hf_weights, "save_file", permuted_rows),
    "rope base": (export_module, "hf_config", altered_config(rope_parameters=WRONG_BASE)),
    "norm eps": (export_module, "hf_config", altered_config(rms_norm_eps=1e-2)),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_a_wrong_export_is_not_published(
    publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, planted: str
) -> None:
    monkeypatch.setattr(*planted)
    with pytest.raises(CheckpointError, match=r"Read by triplane, .* nothing was published"):
        publish()
    assert list(tmp_path.iterdir()) == []


def test_what_only_transformers_reads_otherwise_is_not_published(
    publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Gate and up swapped both ways: our reader swaps them back."""
    monkeypatch.setitem(FAMILIES, "llama", with_gate_and_up_swapped())
    with pytest.raises(CheckpointError, match=r"Read by transformers 5.* nothing was published"):
        publish()
    assert list(tmp_path.iterdir()) == []


def planted(**changes: Any) -> Callable[..., None]:
    """Writes the right tokenizer but for `changes` of its files' keys."""
    right = export_module.write_hf_tokenizer

    def write(tokenizer: Tokenizer, folder: Path, context: int) -> None:
        right(tokenizer, folder, context)
        for name, keys in changes.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return write


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"tokenizer": {"normalizer": X_FOR_Y}},
            "tokenizers reads other tokens",
        ),
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}, "transformers reads other tokens"),
        (
            {"tokenizer": {"post_processor": None}, "tokenizer_config": {"bos_token": "<|eos|>"}},
            "begin a text with bos",
        ),
    ],
    ids=["text", "class", "bos"],
)
def test_another_tokenization_is_not_published(
    publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(export_module, "write_hf_tokenizer", planted(**changes))
    with pytest.raises(CheckpointError, match=expected):
        publish()
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_the_parent_and_the_rules_of_the_tokenizer(
    publish: Callable[..., Any], tokenizer_model: Path, tmp_path: Path
) -> None:
    *_, folder = publish()
    card = (folder / "README.md").read_text()
    assert "trained from scratch" in card and "license:" not in card
    assert "Every text of the training began with `<|bos|>`, which the tokenizer puts there." in card
    assert "`LlamaTokenizer` reads the same files by rules of its own" in card
    config = small_config(vocab_size=VOCAB)
    tokenizer = open_tokenizer(tokenizer_model)
    parent = Parent(name="someone/theirs", licence="apache-2.0")
    export_fp32(random_weights(config), config, tmp_path / "b", tokenizer=tokenizer, parent=parent)
    card = (tmp_path / "b/README.md").read_text()
    assert "from scratch" not in card and "from the weights of someone/theirs, whose licence is apache-2.0" in card
    assert 'base_model: "someone/theirs"\nlicense: apache-2.0\n---\n' in card


def test_a_tokenizer_json_goes_out_as_it_came(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = byte_level(tmp_path / "in" / "tokenizer.json", QWEN2)
    tokenizer = open_tokenizer(path)
    config = small_config(vocab_size=tokenizer.vocab_size + 5)  # embeddings to spare, as many models have
    export_fp32(random_weights(config), config, tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("some text", add_special_tokens=False) == tokenizer.encode("some text")
    assert theirs.model_max_length == 64
    assert "put it before yours" in (tmp_path / "out/README.md").read_text()


def test_the_card_of_a_tokenizer_without_letters_is_told(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "1": 1}, []))
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert "put it before yours" in export_module._begins_with_bos(open_tokenizer(tmp_path), tmp_path)


def test_an_export_that_turns_into_nan_is_not_published(
    publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        hf_weights_save({name: tensor / 0 for name, tensor in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(hf_weights, "save_file", damaged)
    with pytest.raises(CheckpointError, match=r"Read by triplane, .* are not finite"):
        publish()


def test_weights_that_are_not_finite_are_not_published(publish: Callable[..., Any], tmp_path: Path) -> None:
    weights = random_weights(small_config(vocab_size=VOCAB))
    weights["blocks.0.attention.wo.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="As float32, the logits are not finite"):
        publish(weights=weights)
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_the_report_says_so(publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = verify.importlib.util.find_spec
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: name != "transformers" and find_spec(name))
    *_, report, folder = publish()
    assert report.transformers_difference is None
    assert "transformers is not installed" in (folder / "README.md").read_text()


def test_where_memory_is_too_small_for_transformers_the_report_says_so(
    publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    *_, report, folder = publish()
    assert report.transformers_difference is None
    assert "transformers needs 0 GiB, 0 are free, so it has not read" in (folder / "README.md").read_text()


def test_a_full_disk_is_a_line_and_leaves_nothing(tokenizer_model: Path, small_disk: Path) -> None:
    config = small_config(vocab_size=VOCAB, hidden_dim=1000)
    tokenizer = open_tokenizer(tokenizer_model)
    with pytest.raises(CheckpointError, match=r"out: cannot be written: .*No space left on device.*; make room"):
        export_fp32(random_weights(config), config, small_disk / "out", tokenizer=tokenizer)
    assert list(small_disk.iterdir()) == []


def test_an_existing_folder_is_refused(publish: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="model exists; remove it"):
        publish()
    assert list((tmp_path / "model").iterdir()) == []


def test_another_models_tokenizer_or_weights_are_refused(
    publish: Callable[..., Any], tokenizer_model: Path, tmp_path: Path
) -> None:
    config = small_config(vocab_size=VOCAB - 1)
    with pytest.raises(CheckpointError, match="has 400 tokens, the model 399"):
        export_fp32(random_weights(config), config, tmp_path / "model", tokenizer=open_tokenizer(tokenizer_model))
    with pytest.raises(ModelError, match="missing from the weights"):
        publish(weights={})
    assert list(tmp_path.iterdir()) == []
