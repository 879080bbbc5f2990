"""The worked example of docs/model.md: one file and one row make a new norm, on every layout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import triplane

ROOT = Path(__file__).parents[2]
SOURCE = Path(triplane.__file__).parent
SECTION = (ROOT / "docs/model.md").read_text().partition("## Adding a part")[2]
PART, ROW = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
(TABLE,) = re.findall(r"```toml\n(.*?)```", SECTION, re.DOTALL)
PROGRAM = """
import json, sys, tomllib
import torch
import triplane.model
from triplane.model.config import ModelConfig
from triplane.model.count import count_parameters
from triplane.model.transformer import Transformer
from triplane.parallel import megatron, zero  # before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.prove.cases import Case
from triplane.prove.compare import train_case
from triplane.prove.forked import run_ranks
from triplane.prove.reference import proof_model, train_plainly

content = proof_model().model_dump() | tomllib.loads(sys.argv[1])
# Dynamic Tanh does not enlarge small values, whose gradients would vanish.
content |= {"init_std": 0.3, "embedding_scale": 5.0}
content["attention"] |= {"qk_norm": {"kind": "dyt"}, "qk_norm_over": "all"}
config = ModelConfig.model_validate(content)
with torch.device("meta"):
    built = Transformer(config)
reference = train_plainly(config, 3)
largest = 0.0
for options in ({}, {"sequence_parallel": True}):
    case = Case(ParallelConfig(tp=2, dp=1, **options), tied=False, precision="fp32")
    for difference, _ in run_ranks(case.layout, 2, train_case, config, case, reference):
        largest = max(largest, difference.largest)
alphas = {name: tensor.item() for name, tensor in reference.state.items() if "weight/" in name and "alpha" in name}
print(json.dumps({
    "package": triplane.model.__file__,
    "kinds": [config.norm.kind, config.attention.qk_norm.kind],
    "counted": count_parameters(config),
    "built": sum(parameter.numel() for parameter in built.parameters()),
    "initial": {name: parameter.init for name, parameter in built.norm.weights.items()},
    "alphas": alphas,
    "losses": reference.losses,
    "largest": largest,
}))
"""


@pytest.fixture(name="package")
def package_with_the_part(tmp_path: Path) -> Path:
    """A copy of `triplane` with the example's file and row; rooms that it leaves alone are links."""
    package = tmp_path / "triplane"
    package.mkdir()
    for entry in SOURCE.iterdir():
        if entry.name == "model":
            shutil.copytree(entry.resolve(), package / "model")
        else:
            (package / entry.name).symlink_to(entry.resolve())
    (package / "model/parts/dyt.py").write_text(PART)
    union = package / "model/parts/softmax.py"
    import_line = "from triplane.model.parts.fix_norm import FixNorm\n"
    text = union.read_text().replace(import_line, f"from triplane.model.parts.dyt import DynamicTanh\n{import_line}")
    lines = [ROW.rstrip() if line.startswith("AnyNorm =") else line for line in text.splitlines()]
    assert ROW.rstrip() in lines and "from triplane.model.parts.dyt import DynamicTanh" in lines
    union.write_text("\n".join(lines) + "\n")
    return package


def test_the_example_is_short() -> None:
    assert len(PART.splitlines()) + len(ROW.splitlines()) <= 40


@pytest.mark.slow
def test_a_file_and_a_row_train_under_tensor_parallelism_as_on_one_process(package: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, TABLE],
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["package"] == str(package / "model/__init__.py")
    assert found["kinds"] == ["dyt", "dyt"]
    assert found["counted"] == found["built"]
    assert found["initial"] == {"alpha": 0.8, "weight": 1.0, "bias": 0.0}
    # Five layers of two norms and those of queries and keys, and the last norm; each alpha has learned.
    assert len(found["alphas"]) == 21
    assert all(abs(alpha - (0.5 if "attention." in name else 0.8)) > 1e-4 for name, alpha in found["alphas"].items())
    assert found["losses"][2] < found["losses"][0]
    assert found["largest"] < 1e-5
