"""The reference of the config is that of this version, and the schema accepts what the config accepts."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from commands import triplane

from triplane.config.explain import _paths
from triplane.config.load import load_config
from triplane.config.overrides import Override
from triplane.config.schema import file_schema
from triplane.storage.errors import ConfigError
from triplane.training.config import RunConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PARTS = """
[model]
attention = { n_heads = 4, n_kv_heads = 2, head_dim = 8 }
feed_forward = { kind = "plain", hidden_dim = 64 }
norm = { eps = 1e-6 }
positions = { scaling = { kind = "yarn", factor = 4 } }
layers = [{ repeat = 2, attention = { window = 64 } }, { positions = { kind = "none" } }]
"""


def test_the_reference_in_docs_is_that_of_this_version(tmp_path: Path) -> None:
    printed = triplane("config", "--reference", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    written = (ROOT / "docs/config.md").read_text()
    assert printed.stdout == written, "write it again: triplane config --reference > docs/config.md"
    rows = [line.split(" | ") for line in written.splitlines() if line.startswith("| `")]
    assert {path[-1] for path in _paths(RunConfig)} == {row[0].strip("|` ") for row in rows}
    assert all(row[1] and row[3].strip("| ") for row in rows)


def test_neither_imports_torch(tmp_path: Path) -> None:
    for option in ("--reference", "--schema"):
        code = (
            "import sys; from triplane.launcher.cli import app\n"
            f"app(['config', {option!r}], standalone_mode=False)\n"
            "assert 'torch' not in sys.modules"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and result.stdout, result.stderr


def test_one_of_the_two_is_given(tmp_path: Path) -> None:
    for options in ((), ("--reference", "--schema")):
        result = triplane("config", *options, cwd=tmp_path)
        assert result.returncode == 2 and result.stderr == "triplane: config: give one of --reference and --schema\n"


def _accepts(config: dict[str, Any], schema: dict[str, Any]) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(config)


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    printed: dict[str, Any] = json.loads(triplane("config", "--schema", cwd=tmp_path_factory.mktemp("schema")).stdout)
    jsonschema.Draft202012Validator.check_schema(printed)
    assert printed == file_schema()
    return printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_accepts_the_shipped_configs(path: Path, schema: dict[str, Any]) -> None:
    assert _accepts(tomllib.loads(path.read_text()), schema)


def test_the_schema_accepts_parts_without_their_kind(schema: dict[str, Any], tmp_path: Path) -> None:
    config = tomllib.loads((ROOT / "configs/quickstart.toml").read_text())
    config["model"] = {"vocab_size": 8, "dim": 32, "n_layers": 3} | tomllib.loads(PARTS)["model"]
    assert _accepts(config, schema)


MISTAKES = [
    "model.n_headz=4",
    "model.n_heads='four'",
    "model.positions={kind='rotory'}",
    "model.feed_forward={kind='plain', hiden=4}",
    "parallel.zero=4",
    "optimizer.lr=0.0",
    "data.sources=[]",
    "training.steps=none",
    "learning_rate=1.0",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_schema_refuses_what_the_config_refuses(mistake: str, schema: dict[str, Any]) -> None:
    path = ROOT / "configs/quickstart.toml"
    assert not _accepts(Override.parse(mistake).apply(tomllib.loads(path.read_text())), schema)
    with pytest.raises(ConfigError):
        load_config(path, [mistake])
