"""Publishes weights as a Hugging Face model, once its files are proven to compute what the weights do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from triplane.checkpoint.parent import Parent
from triplane.data.tokenizer import Tokenizer
from triplane.hf.config import family_of, hf_config, possible_windows
from triplane.hf.exportable import export_problems
from triplane.hf.tokenizer import hf_files, tokenizer_class, write_hf_tokenizer
from triplane.hf.verify import ExportReport, probe, probe_logits, verify
from triplane.hf.weights import write_weights
from triplane.model.config import ModelConfig
from triplane.model.count import count_parameters
from triplane.model.describe import model_weights
from triplane.storage.errors import CheckpointError
from triplane.storage.publish import publishing, refuse_existing


def export(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    out: Path,
    *,
    context: int,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    provenance: dict[str, str],
    parent: Parent | None = None,
) -> ExportReport:
    """Writes the folder `out`: config, safetensors, tokenizer, and a model card that shows `provenance` and `parent`.

    `weights` are whole tensors by our parameter names. The files are written beside `out`, then read back
    by our reader and, where it is installed, by transformers: both must give the logits of `weights`
    rounded to `dtype`, and the tokens of `tokenizer`. Only then does `out` appear. Raises CheckpointError, and leaves
    nothing, if `out` exists, one of `export_problems` stands against it, or a logit or token differs.
    Holds, besides `weights`, one file of the folder at a time, and the whole model only for transformers, which is
    left out if memory is too small.
    """
    refuse_existing(out)
    if problems := export_problems(config, tokenizer):
        raise CheckpointError("\n".join(problems))
    family = family_of(config, context, tokenizer=tokenizer_class(hf_files(tokenizer)))
    content = hf_config(config, context, family, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, dtype=_name(dtype))
    tokens_BS = probe(config, context, possible_windows(content))
    expected_TV = probe_logits(config, weights, tokens_BS, rounded_to=dtype)
    if not expected_TV.isfinite().all():
        raise CheckpointError(f"As {_name(dtype)}, the logits are not finite; export an earlier step.")

    with publishing(out) as folder:
        _write_json(folder / "config.json", content)
        ids = {key: content[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(folder / "generation_config.json", ids)
        nearest = family.nearest(config, context)
        zeros = model_weights(nearest).keys() - model_weights(config).keys()
        write_weights(weights, family.tensors(nearest), folder, dtype=dtype, zeros=zeros)
        write_hf_tokenizer(tokenizer, folder, context)
        report = verify(folder, tokens_BS, expected_TV, tokenizer=tokenizer)
        facts = {"parameters": f"{count_parameters(config):,}", "context": f"{context:,} tokens", "dtype": _name(dtype)}
        begins = _begins_with_bos(tokenizer, folder)
        card = _card(out.name, facts | provenance, report=report, parent=parent, begins=begins)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def _begins_with_bos(tokenizer: Tokenizer, folder: Path) -> str:
    """Explains the token that started each training text, for the model card."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = library.id_to_token(tokenizer.bos_id)
    if library.encode("a").ids[:1] == [tokenizer.bos_id]:  # a model may not know the letter
        return f"Every text of the training began with `{bos}`, which the tokenizer puts there."
    return f"Every text of the training began with `{bos}`; put it before yours, since the tokenizer does not."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _card(name: str, facts: dict[str, str], *, report: ExportReport, parent: Parent | None, begins: str) -> str:
    """Returns the model card that the Hugging Face hub shows."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    head = "library_name: transformers\npipeline_tag: text-generation\n"
    origin = "trained from scratch with triplane"
    if parent is not None:
        head += f"base_model: {json.dumps(parent.name)}\n"
        head += f"license: {parent.licence}\n" if parent.licence else ""
        licence = f"whose licence is {parent.licence}" if parent.licence else "whose licence its folder did not tell"
        origin = f"trained with triplane from the weights of {parent.name}, {licence}"
    return f"""---
{head}---

# {name}

A decoder-only language model, {origin}.

| | |
| --- | --- |
{rows}

Verified before it was published: {report}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

{begins} Load the tokenizer by `AutoTokenizer` as above: `LlamaTokenizer` reads the same files by rules of its own, and
gives other tokens.
"""
