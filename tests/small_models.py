"""Small models with weights that make every part matter, ours and transformers' from the same numbers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triplane.hf.config import family_of, hf_config
from triplane.hf.families.table import FAMILIES
from triplane.hf.family import Family
from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.build import load_model
from triplane.model.config import ModelConfig
from triplane.model.transformer import Transformer


def small_config(**changes: Any) -> ModelConfig:
    heads = {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8}
    hidden = {} if "feed_forward" in changes else {"hidden_dim": 80}
    return ModelConfig(**({"vocab_size": 96, "dim": 48, "n_layers": 2} | hidden | heads | changes))


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Matrices that keep the scale of what they read, so that a wrong frequency or row moves the logits."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    normal = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.2 * w if w.ndim == 1 else w / w.shape[1] ** 0.5 for name, w in normal.items()}


def small_model(config: ModelConfig, seed: int = 0) -> Transformer:
    return load_model(config, random_weights(config, seed), torch.float32)


def llama(config: ModelConfig, weights: dict[str, Tensor], seq_len: int = 64) -> Any:
    """Returns transformers' own model with our weights, fp32; a Qwen2 if it has biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    content = hf_config(config, seq_len, _family(config), bos_id=None, eos_id=None, dtype="float32")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content)).eval()
    missing, unexpected = model.load_state_dict(hf_state(config, weights), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return model


def hf_state(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by the names of the first family that fits."""
    tensors = _family(config).tensors(config)
    return {name: stored.joined([weights[w.name] for w in stored.weights]) for name, stored in tensors.items()}


def _family(config: ModelConfig) -> Family:
    return family_of(config, tokenizer="Qwen2Tokenizer")


def with_gate_and_up_swapped() -> Family:
    """Returns Llama's row with two names swapped both ways: only another reader notices."""
    llama = FAMILIES["llama"]
    names = llama.names_of(small_config())
    swap = {"mlp.gate_proj": "feed_forward.w_up", "mlp.up_proj": "feed_forward.w_gate"}
    return replace(llama, names=replace(names, layer={**names.layer, **swap}))


def packed(documents: list[Tensor]) -> Batch:
    """Documents one after another, each of which predicts its own next tokens."""
    ends = torch.tensor([len(d) for d in documents]).cumsum(0).tolist()
    targets = [torch.cat((d[1:], torch.tensor([IGNORED_TARGET]))) for d in documents]
    return Batch.build(torch.cat(documents), torch.cat(targets), (0, *ends))


def random_documents(config: ModelConfig, lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(config.vocab_size, (n,), generator=generator) for n in lengths]


def state_after(step: int) -> dict:
    """The least that a checkpoint says of its run."""
    return {"step": step, "consumed_sequences": 0, "tokens_seen": 0, "run": {}}
