"""Proves that a Hugging Face folder computes what our weights do."""

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.hf_weights import FolderWeights
from triplane.data.tokenizer import Tokenizer
from triplane.model.batch import Batch
from triplane.model.build import load_model
from triplane.model.config import ModelConfig
from triplane.model.hf import from_hf_config
from triplane.model.transformer import Transformer

_TOLERANCE = 2e-5
"""Allowed difference of two logits, as a share of the largest; ten times what another order of fp32 sums gives."""

_PROBE_TOKENS = 256

_PROBE_TEXT = "def f(x):\n\treturn x ** 2    # 1,234.5 → naïve 漢字 🙂\r\n  <s> and </s> are text here \n"


@dataclass(frozen=True)
class ExportReport:
    """How far the logits of a Hugging Face folder are from ours, all in fp32."""

    largest_logit: float
    difference: float
    """As triplane reads the folder."""
    transformers: str | None
    """The version that read the folder too; None where it is not installed."""
    transformers_difference: float | None

    def __str__(self) -> str:
        own = f"Logits reach {self.largest_logit:.3g}; read by triplane they differ by at most {self.difference:.1e}"
        if self.transformers is None:
            return f"{own}; transformers is not installed, so it has not read these files."
        return f"{own}, by transformers {self.transformers} by {self.transformers_difference:.1e}."


def probe(config: ModelConfig, seq_len: int) -> Tensor:
    """The fixed tokens that every model of a comparison reads: two sequences, (B, S)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, min(seq_len, _PROBE_TOKENS)), generator=generator)


@torch.inference_mode()
def probe_logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """Logits of each sequence alone, (T, V); turns `model` into fp32, which rounds no weight."""
    sequences, length = tokens_BS.shape
    tokens_T = tokens_BS.flatten()
    return model.float().logits(Batch.build(tokens_T, tokens_T, range(0, sequences * length + 1, length)))


def verify(folder: Path, tokens_BS: Tensor, expected_TV: Tensor, tokenizer: Tokenizer | None) -> ExportReport:
    """Reads `folder` as triplane and, where it is installed, as transformers does.

    Raises CheckpointError unless both give the logits `expected_TV` of `tokens_BS`, and transformers the
    tokens of `tokenizer`, if one is given.
    """
    config = from_hf_config(json.loads((folder / "config.json").read_text()))
    exported = load_model(config, FolderWeights(folder), torch.float32)
    difference = _difference("triplane", probe_logits(exported, tokens_BS), expected_TV)
    version = their_difference = None
    if importlib.util.find_spec("transformers"):
        del exported
        version = importlib.metadata.version("transformers")
        logits_TV = _through_transformers(folder, tokens_BS, tokenizer)
        their_difference = _difference(f"transformers {version}", logits_TV, expected_TV)
    return ExportReport(expected_TV.abs().max().item(), difference, version, their_difference)


def _difference(reader: str, logits_TV: Tensor, expected_TV: Tensor) -> float:
    difference, largest = (logits_TV - expected_TV).abs().max().item(), expected_TV.abs().max().item()
    if not difference <= _TOLERANCE * largest:  # not `>`, which NaN would pass
        raise CheckpointError(
            f"Read by {reader}, the Hugging Face folder's logits differ from ours by {difference:.2e}, more than "
            f"{_TOLERANCE * largest:.2e}; nothing was published."
        )
    return difference


@torch.inference_mode()
def _through_transformers(folder: Path, tokens_BS: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Logits, (T, V), after a check of the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    if tokenizer is not None:
        theirs = AutoTokenizer.from_pretrained(folder)
        tokens = theirs.encode(_PROBE_TEXT)
        if tokens != tokenizer.encode(_PROBE_TEXT) or theirs.decode(tokens) != _PROBE_TEXT:
            raise CheckpointError("transformers reads other tokens than sentencepiece does; nothing was published.")
    logits_BSV: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens_BS).logits
    return logits_BSV.flatten(0, 1)
