"""Every file in configs/ fits the number of ranks that its header names."""

from pathlib import Path

import pytest

from triplane.config.checks import check, tokens_per_step
from triplane.config.load import load_config
from triplane.model.count import count_parameters
from triplane.model.describe import model_weights

CONFIGS = Path(__file__).parents[2] / "configs"
# Ranks, parameters, tokens in a step. The totals of released models are those of their checkpoints.
SHIPPED = {
    "quickstart": (2, 1_901_696, 4_096),
    "experts": (2, 3_675_296, 4_096),
    "125m": (1, 124_275_456, 524_288),
    "1b": (8, 1_103_194_112, 1_048_576),
    "gpt2": (8, 124_439_808, 524_288),
    "pythia-1b": (8, 1_011_781_632, 1_048_576),
    "qwen3-0.6b": (8, 596_049_920, 1_048_576),
    "gemma3-1b": (8, 999_885_952, 1_048_576),
    "olmo2-1b": (8, 1_484_916_736, 2_097_152),
    "original-2017-decoder": (1, 35_679_232, 65_536),
    "8b": (64, 8_030_261_248, 2_097_152),
    "mixtral-8x7b": (64, 46_702_792_704, 4_194_304),
    "qwen3-30b-a3b": (64, 30_532_122_624, 4_194_304),
    "deepseek-v3": (2048, 682_636_487_424, 62_914_560),
    "70b": (256, 70_553_706_496, 4_194_304),
    "405b": (512, 405_853_388_800, 4_194_304),
}


def test_every_config_is_listed_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config(name: str) -> None:
    ranks, parameters, tokens = SHIPPED[name]
    config = load_config(CONFIGS / f"{name}.toml")
    assert check(config, ranks) == []
    assert count_parameters(config.model) == parameters
    assert tokens_per_step(config) == tokens
    assert config.run_dir == f"runs/{name}"
    if ranks > 2:
        assert f"{ranks} GPUs" in (CONFIGS / f"{name}.toml").read_text().split("\n\n")[0]


def test_a_token_multiplies_37_billion_weights_of_deepseek_v3() -> None:
    model = load_config(CONFIGS / "deepseek-v3.toml").model
    weights = model_weights(model.model_copy(update={"predict_further": None})).values()
    products = (w for w in weights if w.role == "matrix" or w.name == "head.weight")
    assert round(sum(w.elements * w.share for w in products) / 1e9) == 37
