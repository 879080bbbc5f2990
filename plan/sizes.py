"""The shapes of networks that `triplane init` writes."""

from typing import Any, NamedTuple


class Choice(NamedTuple):
    """A value of the config, and why it is that."""

    value: Any
    why: str


class Size(NamedTuple):
    """Width, depth and context of a network with as many parameters as its name says, within a tenth.

    That is with 1,024 token ids for 1m, 8,192 for 10m and 32,768 for the others: more make a larger table.
    """

    dim: int
    n_layers: int
    seq_len: int


SIZES = {
    "1m": Size(128, 4, 256),
    "10m": Size(256, 10, 512),
    "125m": Size(768, 14, 1024),
    "1b": Size(2048, 22, 2048),
    "8b": Size(4096, 44, 4096),
}
_WIDE, _WIDEST = 2048, 4096


def network(name: str, vocab_size: int) -> dict[str, Choice]:
    """Returns the table `[model]` of a Llama of that size."""
    size = SIZES[name]
    head_dim = 128 if size.dim >= _WIDEST else 64
    heads, wide = size.dim // head_dim, size.dim >= _WIDE
    return {
        "vocab_size": Choice(vocab_size, "that of the corpus's tokenizer"),
        "dim": Choice(size.dim, f"of size {name}"),
        "n_layers": Choice(size.n_layers, f"of size {name}"),
        "n_heads": Choice(heads, "dim / head_dim"),
        "n_kv_heads": Choice(
            heads // 4 if wide else heads,
            "four query heads share a key head, as in Llama 3 8B" if wide else "one for each query head",
        ),
        "head_dim": Choice(head_dim, "64, and 128 from a width of 4096 on, as in Llama 3"),
        "hidden_dim": Choice(
            -(-8 * size.dim // 3 // 64) * 64, "8/3 dim, which makes a gated part as large as a plain one (Shazeer 2020)"
        ),
        "tie_embeddings": Choice(
            not wide,
            "the table is a small part of a large model" if wide else "the table is a large part of a small model",
        ),
    }
