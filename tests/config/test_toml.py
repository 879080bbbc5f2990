"""A config saved with a run loads to the same config."""

import tomllib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from triplane.config.load import load_config
from triplane.config.toml import format_value, to_toml
from triplane.model.config import ModelConfig
from triplane.training.config import RunConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()


@given(scalars)
def test_every_scalar_is_read_back(value: object) -> None:
    read = tomllib.loads(f"value = {format_value(value)}")["value"]
    assert read == value and type(read) is type(value)


def test_every_config_is_read_back(tmp_path: Path) -> None:
    assert CONFIGS
    for path in CONFIGS:
        rotary = hasattr(load_config(path).model.positions, "scaling")
        scaling = ["model.rope_scaling={kind='llama3', factor=8}"] if rotary else []
        config = load_config(path, [*scaling, "schedule.final_lr_fraction=1e-7"])
        (tmp_path / "a.toml").write_text(to_toml(config))
        assert load_config(tmp_path / "a.toml") == config


def test_what_a_layer_unsets_is_read_back(tmp_path: Path) -> None:
    """Gemma 3 scales the positions of its full layers alone, gpt-oss windows every other."""
    gemma = load_config(CONFIGS[0], ["model.rope_scaling={kind='linear', factor=8}"]).model
    assert gemma.attention.qk_norm is None and gemma.n_layers % 5
    values = gemma.model_dump()
    values["attention"] |= {"window": 64, "qk_norm": {"kind": "rms"}, "sinks": True}
    full = {"window": None, "qk_norm": None, "sinks": False}
    values["layers"] = [
        {"repeat": 2, "positions": values["positions"] | {"base": 5e3, "scaling": None}},
        {"attention": values["attention"] | full},
        {"positions": {"kind": "none"}, "feed_forward": {"kind": "plain", "hidden_dim": 99, "activation": "none"}},
        {"attention": values["attention"]},
    ]
    model = ModelConfig.model_validate(values)
    config = load_config(CONFIGS[0]).model_copy(update={"model": model})
    (tmp_path / "a.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "a.toml") == config
    assert tomllib.loads(to_toml(config))["model"]["layers"] == [
        {"repeat": 2, "positions": {"base": 5e3, "scaling": "unset"}},
        {"attention": {"window": "unset", "qk_norm": "unset", "sinks": False}},
        {
            "positions": {"kind": "none"},
            "feed_forward": {"kind": "plain", "hidden_dim": 99, "activation": "none", "bias": True},
        },
        {"attention": {}},
    ]


def test_it_reads_like_a_config_by_hand() -> None:
    config = RunConfig.model_validate(
        {
            "run_dir": "runs/a",
            "model": {
                "vocab_size": 9,
                "dim": 8,
                "n_layers": 1,
                "n_heads": 1,
                "n_kv_heads": 1,
                "head_dim": 8,
                "hidden_dim": 8,
            }
            | {"rope_scaling": {"kind": "linear", "factor": 2}},
            "data": {"sources": [{"corpus": "c"}], "seq_len": 4},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )
    lines = to_toml(config).splitlines()
    assert lines[:6] == ['run_dir = "runs/a"', "seed = 0", "tracking = []", "", "[model]", "vocab_size = 9"]
    scaling = lines.index("[model.positions.scaling]")
    assert lines[scaling - 1 : scaling + 3] == ["", "[model.positions.scaling]", 'kind = "linear"', "factor = 2.0"]
