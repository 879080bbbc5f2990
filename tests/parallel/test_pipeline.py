"""Stages are balanced by cost, and hold each layer once."""

from itertools import product
from typing import Any

import pytest

from triplane.model.config import ModelConfig
from triplane.model.count import head_flops, layer_flops
from triplane.model.parts.further import PredictFurther
from triplane.model.parts.learned import LearnedPositions
from triplane.model.parts.relative import RelativePositions
from triplane.model.parts.rms import RmsNorm
from triplane.parallel.stages import copied_weights, stage_layers
from triplane.storage.errors import LayoutError


def config(n_layers: int, vocab_size: int, further: int = 0, **options: Any) -> ModelConfig:
    shape: dict[str, Any] = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 128}
    options |= {"predict_further": PredictFurther(depth=further)} if further else {}
    return ModelConfig(vocab_size=vocab_size, n_layers=n_layers, **shape, **options)


def costs(model: ModelConfig, sizes: list[int]) -> list[float]:
    head, block = head_flops(model), layer_flops(model, model.layer(0), 32)
    costs = [float(size * block) for size in sizes]
    costs[0] += 0.1 * head
    further = model.n_blocks - model.n_layers
    costs[-1] += head + further * (block + 12 * model.dim**2 + 1.1 * head)
    return costs


def divisions(n_layers: int, stages: int) -> list[tuple[int, ...]]:
    """Every way to give each layer to a stage in order; only the last may go without."""
    counts = [range(stage < stages - 1, n_layers + 1) for stage in range(stages)]
    return [sizes for sizes in product(*counts) if sum(sizes) == n_layers]


@pytest.mark.parametrize(("vocab_size", "further"), [(64, 0), (1000, 0), (20_000, 0), (64, 1), (1000, 2)])
@pytest.mark.parametrize(("n_layers", "stages"), [(3, 2), (6, 2), (7, 3), (8, 4), (3, 4), (9, 5)])
def test_no_other_division_has_a_cheaper_costliest_stage(
    n_layers: int, stages: int, vocab_size: int, further: int
) -> None:
    model = config(n_layers, vocab_size, further)
    layers = stage_layers(model, stages, 32)
    assert [layer for stage in layers for layer in stage] == list(range(n_layers))
    best = min(max(costs(model, list(sizes))) for sizes in divisions(n_layers, stages))
    assert max(costs(model, [len(stage) for stage in layers])) == pytest.approx(best)


def test_a_large_head_takes_layers_off_the_last_stage() -> None:
    assert [len(stage) for stage in stage_layers(config(8, 64), 2, 32)] == [4, 4]
    assert [len(stage) for stage in stage_layers(config(8, 2000), 2, 32)] == [5, 3]
    assert [len(stage) for stage in stage_layers(config(8, 64, further=2), 2, 32)] == [5, 3]


def test_the_largest_configs_are_divided_at_once() -> None:
    shape: dict[str, Any] = {"dim": 16_384, "n_heads": 128, "n_kv_heads": 8, "head_dim": 128, "hidden_dim": 53_248}
    llama = ModelConfig(vocab_size=128_256, n_layers=126, **shape)
    sizes = [len(stage) for stage in stage_layers(llama, 16, 8192)]
    assert sum(sizes) == 126
    assert max(sizes) == 8
    assert sizes[-1] < 8


def test_later_stages_copy_what_they_read_of_the_first() -> None:
    learned = LearnedPositions(kind="learned", max_seq_len=32)
    embedding: dict[str, Any] = {"positions": learned, "embedding_norm": RmsNorm()}
    assert copied_weights(config(4, 64, **embedding)) == {}
    assert copied_weights(config(4, 64, tie_embeddings=True, **embedding)) == {"embedding.weight": "last"}
    names = ["embedding.weight", "embedding_norm.weight", "positions.0.weight"]
    assert copied_weights(config(4, 64, further=1, **embedding)) == dict.fromkeys(names, "last")
    relative = RelativePositions(buckets=8)
    of_every = {"embedding.weight": "last", "positions.0.weight": "every"}
    assert copied_weights(config(4, 64, further=1, positions=relative)) == of_every


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(LayoutError, match="5 pipeline stages need at least 4 layers, but n_layers is 2"):
        stage_layers(config(2, 64), 5, 32)
