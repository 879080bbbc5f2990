"""Every piece of TOML in README.md and docs/ is part of a config that is accepted."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from triplane.config.checks import check
from triplane.training.config import RunConfig

ROOT = Path(__file__).parents[2]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name} {number}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, snippet in enumerate(
        # A part that the page adds by itself is tested beside its code.
        re.findall(r"```toml\n(.*?)```", page.read_text().partition("## Adding a part")[0], flags=re.DOTALL)
    )
]


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes keys of tables; one that names a kind takes the place of another."""
    return base | {
        key: _over(base.get(key, {}), value) if isinstance(value, dict) and "kind" not in value else value
        for key, value in changes.items()
    }


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_is_part_of_a_config(snippet: str) -> None:
    changes = tomllib.loads(snippet)
    if not re.search(r"^\[", snippet, flags=re.MULTILINE):  # keys of the network, in docs/model.md
        changes = {"model": changes}
    # A run large enough for any of them.
    base = tomllib.loads((ROOT / "configs/8b.toml").read_text()) | {"parallel": {}}
    model = changes.get("model", {})
    repeats = [layer.get("repeat", 1) for layer in model.get("layers", ())]
    base["data"]["seq_len"] = model.get("positions", {}).get("max_seq_len", 4096)
    base["training"]["eval_every_steps"] = 500
    attention = {"n_heads": 32, "n_kv_heads": 32, "head_dim": 128}
    base["model"] = {"vocab_size": 50_304, "dim": 4096, "n_layers": 2 * sum(repeats) or 32, "attention": attention}
    base["model"] |= {"feed_forward": {"hidden_dim": 10_944}}
    config = RunConfig.model_validate(_over(base, changes))
    assert check(config, 8) == []


def test_snippets_are_found() -> None:
    assert len(SNIPPETS) >= 9
