"""Every Hugging Face family, there and back: logits, gradients, training and config, beside transformers' own class."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hf_families import CASES, EQUAL, GPT, SMALL, SQUARE, VARIANTS, their_logits, their_model
from safetensors.torch import load_file, save_file
from small_models import small_config
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from triplane.hf.config import describe, family_of
from triplane.hf.families.table import FAMILIES
from triplane.hf.family import Described, Family
from triplane.hf.folder import FolderWeights, described
from triplane.hf.importing import import_hf
from triplane.hf.weights import write_weights
from triplane.model.batch import Batch
from triplane.model.build import load_model
from triplane.model.config import ModelConfig
from triplane.model.describe import model_weights
from triplane.model.head import Loss
from triplane.model.transformer import Transformer
from triplane.storage.errors import CheckpointError, ModelError
from triplane.training.optimizers.adamw import AdamW

LENGTHS = (1, 17, 300)
"""The windows of the models are 48 tokens."""
RELATIVE = 1e-5


def _read(folder: Path) -> tuple[Described, Transformer]:
    found = described(folder)
    weights = FolderWeights(folder, found.family, found.model)
    weights.check_values()
    return found, load_model(found.model, weights, torch.float32)


def _batch(tokens_S: Tensor) -> Batch:
    return Batch.build(tokens_S, tokens_S.roll(-1), (0, len(tokens_S)))


def _tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(96, (length,), generator=torch.Generator().manual_seed(1000 * seed + length))


def _close(ours: Tensor, theirs: Tensor, least: float = 0.0) -> bool:
    return bool((ours - theirs).abs().max() <= RELATIVE * max(theirs.abs().max().item(), least))


def _in_file(model: Any, *, gradients: bool = False) -> dict[str, Tensor]:
    """Parameters of transformers' model, or their gradients, by the names in its files."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.grad if gradients else parameter
        if name == "lm_head.weight" and model.config.model_type == "gpt_neox":
            found["embed_out.weight"] = value
        elif model.config.model_type.startswith("granitemoe"):
            found[_of_granite(name)] = value
        elif ".mlp.experts." in name and model.config.model_type != "gpt_oss":
            found |= _by_expert(name, value, model.config.model_type)
        elif model.config.model_type == "mixtral":
            found[name.replace(".mlp.", ".block_sparse_moe.")] = value
        else:
            found[name] = value
    return found


def _of_granite(name: str) -> str:
    """The name in a file of one of GraniteMoE's parameters, which transformers renames when it loads them."""
    name = name.replace(".router.weight", ".router.layer.weight")
    name = name.replace(".experts.gate_up_proj", ".input_linear.weight")
    return name.replace(".experts.down_proj", ".output_linear.weight")


def _by_expert(name: str, value: Tensor, family: str) -> dict[str, Tensor]:
    """The tensors of each expert, which transformers joins when it loads them."""
    path, _, leaf = name.rpartition(".")
    own = ("gate_proj", "up_proj", "down_proj")
    if family == "mixtral":
        path, own = path.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
    parts = value.chunk(2, dim=1) if leaf == "gate_up_proj" else (value,)
    names = own[:2] if leaf == "gate_up_proj" else own[2:]
    return {
        f"{path}.{number}.{one}.weight": part
        for one, stacked in zip(names, parts, strict=True)
        for number, part in enumerate(stacked)
    }


def _write(family: Family, config: ModelConfig, model: Transformer, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.write(config, 512)))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_weights(weights, family.tensors(config), folder, dtype=torch.float32)
    return folder


@pytest.mark.parametrize(("name", "keys"), CASES.values(), ids=CASES.keys())
def test_a_family_computes_what_transformers_does_and_comes_back(
    name: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    theirs = their_model(name, keys)
    theirs.save_pretrained(tmp_path / "hf")
    (family, config, _), ours = _read(tmp_path / "hf")
    assert ModelConfig.model_validate(tomllib.loads(tomli_w.dumps(config.as_tables()))) == config
    for length in LENGTHS:
        tokens_S = _tokens(length)
        logits_SV, theirs_SV = ours.logits(_batch(tokens_S)), their_logits(theirs, tokens_S)
        assert _close(logits_SV, theirs_SV), length
    F.cross_entropy(theirs_SV, tokens_S.roll(-1), reduction="sum").backward()
    loss = ours(_batch(tokens_S))
    assert isinstance(loss, Loss)
    loss.objective.backward()
    parameters, gradients = dict(ours.named_parameters()), _in_file(theirs, gradients=True)
    tensors = family.tensors(config)
    trained = {name: stored for name, stored in tensors.items() if stored.weights[0].role != "state"}
    assert trained.keys() == gradients.keys()
    least = max(gradient.abs().max().item() for gradient in gradients.values()) / 100  # biases of keys have none
    for tensor, stored in trained.items():
        parts = [parameters[weight.name].grad for weight in stored.weights]
        assert _close(stored.joined([part for part in parts if part is not None]), gradients[tensor], least), tensor

    for number, other in enumerate({family, family_of(config, 512, tokenizer="Qwen2Tokenizer")}):
        again = AutoModelForCausalLM.from_pretrained(_write(other, config, ours, tmp_path / f"out{number}"))
        assert _close(their_logits(again.eval(), tokens_S), theirs_SV)
        if other is family:
            kept = _in_file(again)
            assert all(kept[tensor].equal(parameter) for tensor, parameter in _in_file(theirs).items())


def test_every_family_is_tried() -> None:
    assert FAMILIES.keys() == VARIANTS.keys() | {"gemma3", "internlm3", "iquestcoder"}


def test_a_layer_of_which_config_json_says_nothing_is_passed_over(tmp_path: Path) -> None:
    """A module that predicts a second token, as one layer more."""
    theirs = their_model("deepseek_v3", VARIANTS["deepseek_v3"][0] | {"num_nextn_predict_layers": 0})
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.ones(48, 96)}, tmp_path / "model.safetensors")
    _, ours = _read(tmp_path)
    assert _close(ours.logits(_batch(_tokens(30))), their_logits(theirs, _tokens(30)))


def _mtp(theirs: Any) -> Any:
    """Returns transformers' module that predicts further."""
    module = MtpModel(theirs, 1).float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.layers.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5)
        bias = module.layers[0].mtp_block.mlp.gate.e_score_correction_bias
        bias += 0.2 * torch.randn(bias.shape, generator=generator)
    return module


def _mtp_in_file(module: Any, *, gradients: bool = False) -> dict[str, Tensor]:
    """Its parameters, or their gradients, by the names of DeepSeek-V3's files, as a layer after four others."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.layers[0].named_parameters():
        value = parameter.grad if gradients else parameter.detach()
        name = f"model.layers.4.{name.removeprefix('mtp_block.').replace('post_norm', 'shared_head.norm')}"
        found |= _by_expert(name, value, "deepseek_v3") if ".mlp.experts." in name else {name: value}
    return found


def test_a_module_that_predicts_a_second_token_is_that_of_transformers(tmp_path: Path) -> None:
    """Its loss and gradients, of a file that holds embedding and head twice; and it comes back."""
    keys = VARIANTS["deepseek_v3"][0] | {"num_nextn_predict_layers": 1}
    theirs = their_model("deepseek_v3", keys)
    theirs.save_pretrained(tmp_path)
    assert _read(tmp_path)[0].model.predict_further is None  # since transformers has not written it
    module = _mtp(theirs)
    saved = load_file(tmp_path / "model.safetensors")
    copies = {"embed_tokens": saved["model.embed_tokens.weight"], "shared_head.head": saved["lm_head.weight"]}
    twice = {f"model.layers.4.{name}.weight": copy.clone() for name, copy in copies.items()}
    bias = module.layers[0].mtp_block.mlp.gate.e_score_correction_bias
    extra = {**_mtp_in_file(module), "model.layers.4.mlp.gate.e_score_correction_bias": bias}
    extra = {name: tensor.contiguous().clone() for name, tensor in extra.items()}
    save_file(saved | extra | twice, tmp_path / "model.safetensors")
    (family, config, _), ours = _read(tmp_path)
    assert config.predict_further is not None and config.n_blocks == 5

    tokens_S = _tokens(60)
    batch = _batch(tokens_S).ahead(1)
    ((next_S, targets_S),) = batch.further
    hidden = theirs.model(tokens_S[None]).last_hidden_state
    places = torch.arange(1, 61)[None]
    cache = MtpCache(config=theirs.config.get_mtp_config())
    logits_SV = theirs.lm_head(module.forward_layer(0, hidden, places, cache, input_ids=next_S[None]))[0]
    loss = F.cross_entropy(logits_SV, targets_S, reduction="sum")
    loss.backward()
    found = ours(batch)
    assert isinstance(found, Loss)
    torch.testing.assert_close(found.further, 0.3 * loss.detach(), rtol=RELATIVE, atol=0)
    (found.objective - ours(_batch(tokens_S)).objective).backward()
    parameters = dict(ours.named_parameters())
    gradients = _mtp_in_file(module, gradients=True) | {
        "model.embed_tokens.weight": theirs.model.embed_tokens.weight.grad,
        "lm_head.weight": theirs.lm_head.weight.grad,
        "model.layers.3.self_attn.o_proj.weight": theirs.model.layers[3].self_attn.o_proj.weight.grad,
    }
    least = max(gradient.abs().max().item() for gradient in gradients.values()) / 100
    for name, gradient in gradients.items():
        stored = family.tensors(config)[name]
        grads = [parameters[weight.name].grad for weight in stored.weights]
        assert _close(stored.joined([grad for grad in grads if grad is not None]), 0.3 * gradient, least), name

    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    write_weights(weights, family.tensors(config), tmp_path, dtype=torch.float32)
    written = load_file(tmp_path / "model.safetensors")
    assert all(written[name].equal(tensor) for name, tensor in (saved | extra).items())
    assert family.write(config, 512)["num_nextn_predict_layers"] == 1


STEPS, CLIP = 10, 0.5
TRAINED = {"llama": SMALL, "gemma2": VARIANTS["gemma2"][0], "gpt_neox": EQUAL, "olmo2": SQUARE}
TRAINED |= {"gpt2": GPT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
TRAINED |= {"bloom": VARIANTS["bloom"][0], "cohere": SMALL, "phi": SQUARE}


class Recorded(Trainer):
    """transformers' Trainer, and the loss of each step."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss


@pytest.mark.parametrize(("name", "keys"), TRAINED.items(), ids=TRAINED.keys())
def test_ten_steps_are_those_of_transformers_trainer(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """AdamW with weight decay for matrices alone, and clipped gradients."""
    theirs = their_model(name, keys)
    theirs.save_pretrained(tmp_path / "hf")
    (family, config, _), ours = _read(tmp_path / "hf")
    settings = AdamW(lr=1e-3, weight_decay=0.1, eps=1e-3)
    sequences = [_tokens(64, seed=step) for step in range(STEPS)]

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_epsilon=settings.eps,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    # The first label has no prediction; of some models Trainer would count it.
    labels = [torch.cat([torch.tensor([-100]), tokens_S[1:]]) for tokens_S in sequences]
    examples = [{"input_ids": tokens_S, "labels": own} for tokens_S, own in zip(sequences, labels)]
    trainer = Recorded(theirs, arguments, train_dataset=examples)
    trainer.losses = []
    trainer.train()

    weights = dict(ours.named_parameters())
    roles = model_weights(config)
    (optimizer,) = settings.adamw(((weight, roles[name]) for name, weight in weights.items()))
    losses = []
    for tokens_S in sequences:
        loss = ours(Batch.build(tokens_S[:-1], tokens_S[1:], (0, len(tokens_S) - 1)))
        assert isinstance(loss, Loss)
        losses.append(loss.cross_entropy.item() / 63)
        optimizer.zero_grad()
        (loss.objective / 63).backward()
        clip_grad_norm_(weights.values(), CLIP)
        optimizer.step()
    assert losses == pytest.approx(trainer.losses, rel=RELATIVE)
    for tensor, stored in family.tensors(config).items():
        joined = stored.joined([weights[weight.name].detach() for weight in stored.weights])
        assert _close(joined, _in_file(theirs)[tensor].detach()), tensor


SIZES = {
    "gpt2": {"n_embd": 128, "n_head": 64, "n_layer": 2},
    "mpt": {"d_model": 128, "n_heads": 64, "n_layers": 2},
    "bloom": {"hidden_size": 128, "n_head": 64, "n_layer": 2},
    "opt": {"hidden_size": 128, "num_attention_heads": 64, "num_hidden_layers": 4, "ffn_dim": 80},
}
SIZES |= {"gpt_bigcode": SIZES["gpt2"], "gptj": SIZES["gpt2"] | {"n_head": 2}}
USUAL = {"hidden_size": 1280, "num_attention_heads": 160, "num_hidden_layers": 4, "intermediate_size": 80}
SIZES |= dict.fromkeys(("deepseek_v2", "deepseek_v3"), USUAL | {"num_attention_heads": 128, "num_experts_per_tok": 6})
HELIUM = {"hidden_size": 2560, "num_attention_heads": 20}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_left_out_have_the_value_that_transformers_takes(family: str, tmp_path: Path) -> None:
    """Written with the sizes alone, and in full by transformers."""
    sizes = SIZES.get(family, USUAL | (HELIUM if family == "helium" else {})) | {"vocab_size": 96}
    content: dict[str, Any] = {"model_type": family} | ({"text_config": sizes} if family == "gemma3" else sizes)
    (tmp_path / "config.json").write_text(json.dumps(content))
    full = AutoConfig.from_pretrained(tmp_path).to_dict()
    if family == "bloom":
        full["seq_length"] = 2048  # which it does not know
    assert describe(content) == describe(full)


def test_a_text_model_within_another_is_imported(tmp_path: Path) -> None:
    """Gemma 3 with its vision tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = VARIANTS["gemma3_text"][0]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "hf")
    imported = import_hf(tmp_path / "hf", tmp_path / "new")
    assert imported.model.n_layers == 4
    names = load_file(tmp_path / "hf/model.safetensors")
    assert any(".vision_tower." in f".{name}" for name in names)
    assert imported.left_out == ["model.vision_tower.", "model.multi_modal_projector."]
    assert (imported.report.transformers_difference or 1) < 1e-5


BARE = {"gpt2": GPT, "bloom": VARIANTS["bloom"][0]}


@pytest.mark.parametrize(("name", "keys"), BARE.items(), ids=BARE.keys())
def test_weights_saved_without_a_head_and_old_buffers_are_read(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    theirs = their_model(name, keys)
    theirs.base_model.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    assert not any(tensor.startswith("transformer.") for tensor in tensors)
    if name == "gpt2":
        save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 512, 512)}, tmp_path / "hf/model.safetensors")
    _, ours = _read(tmp_path / "hf")
    tokens_S = _tokens(60)
    assert _close(ours.logits(_batch(tokens_S)), their_logits(theirs, tokens_S))


FITS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"dim": 50},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"attention": {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "qk_norm": {"kind": "rms"}}},
    "smollm3": {"layers": [{}, {"positions": {"kind": "none"}}]},
    "granite": {"residual_scale": 0.5},
    "helium": {"positions": {"kind": "rotary", "interleaved": True}},
    "ernie4_5": {
        "positions": {"kind": "rotary", "interleaved": True},
        "attention": {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "qkv_bias": True, "output_bias": True},
        "feed_forward": {"kind": "gated", "hidden_dim": 80, "bias": True},
    },
    "deepseek_v3": {
        "attention": {"kind": "latent", "n_heads": 6, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
        "feed_forward": {"kind": "experts", "n_experts": 8, "active": 2, "hidden_dim": 16, "shared": 1}
        | {"router": "sigmoid"},
        "norm": {"eps": 1e-6},
        "layers": [{"feed_forward": {"kind": "gated", "hidden_dim": 80}}, {}],
    },
    "gemma3_text": {
        "layers": [{}, {"attention": {"window": 16}, "positions": {"kind": "rotary", "base": 5e3}}],
        "norm": {"kind": "rms", "unit_offset": True},
        "norm_placement": "sandwich",
        "embedding_scale": 48**0.5,
        "attention": {
            "n_heads": 6,
            "n_kv_heads": 2,
            "head_dim": 8,
            "scale": 0.3,
            "qk_norm": {"kind": "rms", "unit_offset": True},
        },
    },
}


def _config(changes: dict[str, Any]) -> ModelConfig:
    tables = {"n_heads", "n_kv_heads", "head_dim"} if "attention" in changes else set()
    tables |= {"hidden_dim"} if "feed_forward" in changes else set()
    plain = {"vocab_size": 96, "dim": 48, "n_layers": 2, "hidden_dim": 80, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8}
    return ModelConfig(**{key: value for key, value in plain.items() if key not in tables} | changes)


@pytest.mark.parametrize(("family", "changes"), FITS.items(), ids=FITS.keys())
def test_the_first_family_that_fits_is_found(family: str, changes: dict[str, Any]) -> None:
    config = _config(changes)
    found = family_of(config, tokenizer="Qwen2Tokenizer")
    assert found.model_type == family
    assert {w for stored in found.tensors(config).values() for w in stored.weights} == set(
        model_weights(config).values()
    )
    read = describe(json.loads(json.dumps(found.write(config, 128)))).model
    assert found.differences(read, 128) == []


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "sinks": (
        {"attention": {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "sinks": True}},
        r"the nearest, llama, differs: attention.sinks is True, there False$",
    ),
    "a window beside a bias": (
        {"attention": {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "window": 8, "output_bias": True}},
        "nearest, .*, differs: .*attention",
    ),
    "positions": ({"positions": {"kind": "sinusoidal"}}, "nearest, .*, differs: .*positions.kind is sinusoidal"),
    "some layers wider": (
        {"layers": [{}, {"feed_forward": {"kind": "gated", "hidden_dim": 96}}]},
        "feed_forward.hidden_dim is 80 or 96 by layer, there 80",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), UNFIT.values(), ids=UNFIT.keys())
def test_a_network_of_no_family_is_told_how_the_nearest_differs(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected) as caught:
        family_of(_config(changes), 128)
    assert "\n" not in str(caught.value)


def test_a_family_with_a_tokenizer_of_its_own_is_passed_over() -> None:
    """Transformers reads no other tokenizer beside a Qwen2, whatever the folder says."""
    assert family_of(small_config(qkv_bias=True)).model_type == "llama"
    heads = {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "qkv_bias": True}
    windowed = _config({"attention": heads, "layers": [{}, {"attention": {"window": 8}}]})
    with pytest.raises(ModelError, match=r"; qwen2 has it, but transformers takes only a Qwen2Tokenizer with it$"):
        family_of(windowed)


def test_initial_weights_and_loss_do_not_matter_to_a_family() -> None:
    assert family_of(small_config(init_std=0.01, z_loss_weight=1e-4)).model_type == "llama"


def test_biases_that_transformers_ignores_must_be_zero(tmp_path: Path) -> None:
    theirs = their_model("qwen2", SMALL)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.1.self_attn.o_proj.bias"
    save_file({**tensors, bias: torch.zeros(48)}, tmp_path / "model.safetensors")
    _read(tmp_path)
    save_file({**tensors, bias: torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers.1.self_attn.o_proj.bias: not zero, and this model has no output"
    ):
        _read(tmp_path)
