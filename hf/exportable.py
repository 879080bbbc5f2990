"""Tells before training whether a model can be exported; imports no torch."""

from triplane.data.tokenizer import Tokenizer
from triplane.hf.families import llama_problem
from triplane.hf.tokenizer import hf_files
from triplane.model.config import ModelConfig
from triplane.storage.errors import TriplaneError


def export_problems(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """A line each; none if `triplane export` will take the model and its tokenizer."""
    problems = [problem] if (problem := llama_problem(config)) else []
    if (size := tokenizer.vocab_size) > config.vocab_size:
        problems.append(f"the tokenizer has {size} tokens, the model {config.vocab_size}; give its own")
    try:
        hf_files(tokenizer)
    except TriplaneError as error:
        problems.append(str(error))
    return problems
