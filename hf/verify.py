"""Proves that a Hugging Face folder computes what our weights do."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import tokenizers
import torch
from torch import Tensor

from triplane.data.tokenizer import Tokenizer
from triplane.hf.folder import FolderWeights, described
from triplane.model.batch import Batch
from triplane.model.build import streamed_logits
from triplane.model.config import ModelConfig
from triplane.model.count import count_parameters
from triplane.storage.errors import CheckpointError
from triplane.storage.foreign import read_json

_TOLERANCE = 2e-5
"""Allowed difference of two logits, as a share of the largest; ten times what another order of fp32 sums gives."""

_PROBE_TOKENS = 256
"""Positions compared at the end of each sequence."""
_LONGEST_PROBE = 2**15
"""Attention over more tokens takes a CPU too long."""

_PROBE_TEXT = "def f(x):\n\treturn x ** 2    # 1,234.5 → naïve 漢字 🙂\r\n  <s> and </s> are text here \n"


@dataclass(frozen=True)
class ExportReport:
    """Differences between the logits of a Hugging Face folder and ours, all in fp32."""

    largest_logit: float
    difference: float
    """As triplane reads the folder."""
    transformers: str
    """Its version, or why it has not read the folder."""
    transformers_difference: float | None = None

    def __str__(self) -> str:
        own = f"Logits reach {self.largest_logit:.3g}; read by triplane they differ by at most {self.difference:.1e}"
        if self.transformers_difference is None:
            return f"{own}; {self.transformers}, so it has not read these files."
        return f"{own}, by {self.transformers} by {self.transformers_difference:.1e}."


def probe(config: ModelConfig, context: int, windows: Sequence[int] = ()) -> Tensor:
    """The fixed tokens that every model of a comparison reads, within its context: two sequences, (2, S).

    Or one, (1, S), that reaches past each number of `windows` that is below `context`.
    """
    generator = torch.Generator().manual_seed(0)
    farthest = max((window for window in windows if window < context), default=0)
    length = min(context, _LONGEST_PROBE, max(_PROBE_TOKENS, farthest + _PROBE_TOKENS // 4))
    sequences = 2 if length <= _PROBE_TOKENS else 1
    return torch.randint(config.vocab_size, (sequences, length), generator=generator)


def probe_logits(
    config: ModelConfig, weights: Mapping[str, Tensor], tokens_BS: Tensor, rounded_to: torch.dtype = torch.float32
) -> Tensor:
    """Logits of the last tokens of each sequence alone, (T, V), in fp32; holds the weights of one layer at a time."""
    sequences, length = tokens_BS.shape
    tokens_T = tokens_BS.flatten()
    batch = Batch.build(tokens_T, tokens_T, range(0, sequences * length + 1, length))
    last_T = torch.arange(len(tokens_T)).view(sequences, length)[:, -_PROBE_TOKENS:].flatten()
    return streamed_logits(config, weights, batch, rounded_to=rounded_to, rows_T=last_T)


def verify(folder: Path, tokens_BS: Tensor, expected_TV: Tensor, *, tokenizer: Tokenizer | None) -> ExportReport:
    """Reads `folder` as triplane and, where it is installed, as transformers does.

    Raises CheckpointError unless both give the logits `expected_TV` of `tokens_BS`, and the tokens of `tokenizer`, if
    one is given.
    """
    if tokenizer is not None:
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.encode_special_tokens = True
        ids = library.encode(_PROBE_TEXT, add_special_tokens=False).ids
        _check_tokens("tokenizers", ids, library.decode(ids), tokenizer=tokenizer)
    family, config, _ = described(folder)
    weights = FolderWeights(folder, family, config)
    difference = _difference("triplane", probe_logits(config, weights, tokens_BS), expected_TV)
    largest = expected_TV.abs().max().item()
    if not importlib.util.find_spec("transformers"):
        return ExportReport(largest, difference, "transformers is not installed")
    needed_gib, free_gib = 4 * count_parameters(config) / 2**30, psutil.virtual_memory().available / 2**30
    if needed_gib > free_gib:  # it holds the whole model
        why = f"transformers needs {needed_gib:.0f} GiB, {free_gib:.0f} are free"
        return ExportReport(largest, difference, why)
    reader = f"transformers {importlib.metadata.version('transformers')}"
    try:
        theirs_TV = _through_transformers(folder, tokens_BS, tokenizer)
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds, for what it finds wrong with a folder
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{reader} cannot read the Hugging Face folder: {type(error).__name__}: {reason}; nothing was published."
        ) from error
    their_difference = _difference(reader, theirs_TV, expected_TV)
    return ExportReport(largest, difference, reader, transformers_difference=their_difference)


def _difference(reader: str, logits_TV: Tensor, expected_TV: Tensor) -> float:
    if not logits_TV.isfinite().all():
        raise CheckpointError(
            f"Read by {reader}, the Hugging Face folder's logits are not finite; nothing was published."
        )
    difference, largest = (logits_TV - expected_TV).abs().max().item(), expected_TV.abs().max().item()
    if not difference <= _TOLERANCE * largest:  # not `>`, which a NaN of ours would pass
        raise CheckpointError(
            f"Read by {reader}, the Hugging Face folder's logits differ from ours by {difference:.2e}, more than "
            f"{_TOLERANCE * largest:.2e}; nothing was published."
        )
    return difference


def _check_tokens(reader: str, ids: list[int], text: str, *, tokenizer: Tokenizer) -> None:
    expected = tokenizer.encode(_PROBE_TEXT)
    if ids != expected or text != tokenizer.decode(expected):
        raise CheckpointError(f"{reader} reads other tokens than the run's tokenizer; nothing was published.")


@torch.inference_mode()
def _through_transformers(folder: Path, tokens_BS: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Logits of the last tokens of each sequence, (T, V), after a check of the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    if tokenizer is not None:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = theirs.encode(_PROBE_TEXT, add_special_tokens=False, split_special_tokens=True, verbose=False)
        text = str(theirs.decode(ids, clean_up_tokenization_spaces=False))
        _check_tokens("transformers", ids, text, tokenizer=tokenizer)
        added = read_json(folder / "tokenizer_config.json").get("add_bos_token")
        if added is True and theirs.encode("text") != [tokenizer.bos_id, *tokenizer.encode("text")]:
            raise CheckpointError("transformers does not begin a text with bos, once; nothing was published.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model(tokens_BS, logits_to_keep=_PROBE_TOKENS).logits.flatten(0, 1)
