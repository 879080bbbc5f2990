"""config.json of a Hugging Face folder, read as a model config and written from one. Imports no torch."""

from typing import Any

from triplane.hf.families.table import FAMILIES
from triplane.hf.family import Described, Family
from triplane.hf.unsupported import family_problem, weights_problem
from triplane.model.config import ModelConfig
from triplane.storage.errors import ModelError

_ANY_CONTEXT = 2**40
"""Tokens of a context longer than any window."""


def describe(content: object, where: str = "config.json") -> Described:
    """Returns the family, the model and the context that the content of a config.json describes.

    Keys that are absent have transformers' defaults; the loss weights have ours. Raises ModelError, one line that
    begins with `where`, for anything that this model cannot compute.
    """
    if not isinstance(content, dict):
        raise ModelError(f"{where}: holds no table of keys; give a Hugging Face folder")
    if problem := family_problem(content, list(FAMILIES)) or weights_problem(content):
        raise ModelError(f"{where}: {problem}")
    family = FAMILIES[content["model_type"]]
    try:
        return family.read(text_part(content, family))
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def text_part(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """Returns the table of a config.json that describes the text model."""
    if family.nested is None:
        return content
    if not isinstance(found := content.get(family.nested, {}), dict):
        raise ModelError(f"{family.nested} is {str(found)[:60]!r}: no table of keys")
    ties = {key: content[key] for key in ("tie_word_embeddings",) if key in content}
    return found | ties


def family_of(config: ModelConfig, context: int | None = None, *, tokenizer: str | None = None) -> Family:
    """Returns the first family that can express the model; raises ModelError with how the nearest differs.

    `tokenizer` is the class of the tokenizer that goes with it, as its files name it.
    """
    longest = config.longest or _ANY_CONTEXT if context is None else context
    config = config.model_copy(update={"n_layers": len(config.pattern)})  # a family lists layers one by one
    differences: dict[str, list[str]] = {}
    refused, others = [], ""
    for family in FAMILIES.values():
        if not family.written:
            continue
        try:
            found = family.differences(config, longest)
        except ModelError as error:
            refused.append(f"{family.model_type}: {error}")
            continue
        if found:
            differences[family.model_type] = found
        elif family.tokenizer in (None, tokenizer):
            return family
        else:
            others = f"; {family.model_type} has it, but transformers takes only a {family.tokenizer} with it"
    if not differences:
        raise ModelError(f"no Hugging Face family has this network; {refused[0]}")
    nearest = min(differences, key=lambda name: len(differences[name]))
    first, more = differences[nearest][:3], len(differences[nearest]) - 3
    told = ", ".join(first) + (f", and {more} fields more" if more > 0 else "")
    raise ModelError(f"no Hugging Face family has this network; the nearest, {nearest}, differs: {told}{others}")


def hf_config(
    config: ModelConfig, context: int, family: Family, *, bos_id: int | None, eos_id: int | None, dtype: str
) -> dict[str, Any]:
    """Returns the content of config.json of a model that reads `context` tokens.

    RoPE and dtype stand there twice: as transformers 5 names them, and as 4 and most other readers do.
    """
    content = family.write(config, context)
    return content | {"bos_token_id": bos_id, "eos_token_id": eos_id, "dtype": dtype, "torch_dtype": dtype}


def possible_windows(content: dict[str, Any]) -> list[int]:
    """Returns the numbers in a config.json that some reader might take for a window, heeded or not."""
    found = []
    for key, value in content.items():
        if isinstance(value, dict):
            found += possible_windows(value)
        elif ("window" in key or "chunk" in key) and isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
    return found
