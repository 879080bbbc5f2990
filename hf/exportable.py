"""Tells before training whether a model can be exported; imports no torch."""

from triplane.data.tokenizer import Tokenizer
from triplane.hf.config import family_of
from triplane.hf.tokenizer import hf_files, tokenizer_class
from triplane.model.config import ModelConfig
from triplane.storage.errors import TriplaneError


def export_problems(config: ModelConfig, tokenizer: Tokenizer | None) -> list[str]:
    """Returns a line each; none if `triplane export` will take the model and, if it is known, its tokenizer."""
    problems, named = [], None
    if tokenizer is not None:
        if (size := tokenizer.vocab_size) > config.vocab_size:
            problems.append(f"the tokenizer has {size} tokens, the model {config.vocab_size}; give its own")
        try:
            named = tokenizer_class(hf_files(tokenizer))
        except TriplaneError as error:
            problems.append(str(error))
    try:
        family_of(config, tokenizer=named)
    except TriplaneError as error:
        problems.insert(0, str(error))
    return problems
