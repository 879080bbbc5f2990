"""Every file in configs/ fits the number of ranks that its header names."""

from pathlib import Path

import pytest

from triplane.config.checks import check, tokens_per_step
from triplane.config.load import load_config
from triplane.model.count import count_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
# Ranks, parameters, tokens in a step. The Llama totals are those of the published checkpoints.
SHIPPED = {
    "quickstart": (2, 6_524_160, 2_048),
    "125m": (1, 124_275_456, 524_288),
    "1b": (8, 1_103_194_112, 1_048_576),
    "8b": (64, 8_030_261_248, 2_097_152),
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
