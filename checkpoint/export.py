"""Publishes weights as a Hugging Face model, once its files are proven to compute what the weights do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.hf_weights import write_weights
from triplane.checkpoint.publish import publishing, refuse_existing
from triplane.checkpoint.verify import ExportReport, probe, probe_logits, verify
from triplane.data.hf_tokenizer import write_hf_tokenizer
from triplane.data.tokenizer import Tokenizer
from triplane.model.config import ModelConfig
from triplane.model.count import count_parameters
from triplane.model.hf import hf_config


def export(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    seq_len: int,
    tokenizer: Tokenizer,
    out: Path,
    dtype: torch.dtype,
    provenance: dict[str, str],
) -> ExportReport:
    """Writes the folder `out`: config, safetensors, tokenizer, and a model card that shows `provenance`.

    `weights` are whole tensors by our parameter names. The files are written beside `out`, then read back
    by our reader and, where it is installed, by transformers: both must give the logits of `weights`
    rounded to `dtype`. Only then does `out` appear. Raises CheckpointError, and leaves nothing, if `out`
    exists, the tokenizer belongs to another model, or a logit differs; ModelError if Hugging Face has no such model.
    Holds, besides `weights`, one file of the folder at a time, and the whole model only for transformers, which is
    left out if memory is too small.
    """
    refuse_existing(out)
    if (size := tokenizer.vocab_size) != config.vocab_size:
        raise CheckpointError(f"The tokenizer has {size} tokens, the model {config.vocab_size}; give its own.")
    content = hf_config(config, seq_len, tokenizer.bos_id, tokenizer.eos_id, dtype)
    tokens_BS = probe(config, seq_len)
    expected_TV = probe_logits(config, weights, tokens_BS, rounded_to=dtype)
    if not expected_TV.isfinite().all():
        raise CheckpointError(f"As {_name(dtype)}, the logits are not finite; export an earlier step.")

    with publishing(out) as folder:
        _write_json(folder / "config.json", content)
        ids = {key: content[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(folder / "generation_config.json", ids)
        write_weights(weights, config, dtype, folder)
        write_hf_tokenizer(tokenizer, folder)
        report = verify(folder, tokens_BS, expected_TV, tokenizer)
        facts = {"parameters": f"{count_parameters(config):,}", "context": f"{seq_len} tokens", "dtype": _name(dtype)}
        (folder / "README.md").write_text(_card(out.name, facts | provenance, report), encoding="utf-8")
    return report


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _card(name: str, facts: dict[str, str], report: ExportReport) -> str:
    """The model card that the Hugging Face hub shows."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A decoder-only language model, trained from scratch with triplane.

| | |
| --- | --- |
{rows}

Verified before it was published: {report}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""
