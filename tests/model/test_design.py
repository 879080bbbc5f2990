"""A kind of part is one file and a row in a union: no other code asks for it by name."""

import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import get_args

import pytest

from triplane.model import parts
from triplane.model.part import Part

ROOT = Path(__file__).parents[2]
UNIONS = {"model/config.py", "model/parts/softmax.py"}
"""Hold the unions and their default kinds."""
OUTSIDE = {"prove/networks.py"}
"""Names kinds to cover them, as `hf/` does to translate them."""
OTHER_MEANINGS = {
    "scale": {"model/flash.py"},
    "softmax": {"model/parts/experts.py", "model/router.py", "prove/experts.py"},
    "linear": {"training/config.py", "launcher/monitor/curves.py"},
    "layer": {"launcher/monitor/facts_table.py"},
}
COMMON = {"none", "loss", "bias"}
"""Too common words to search for."""
CHOICES = {name: {"model/config.py"} for name in ("pre", "post", "output", "sandwich", "parallel_shared_norm")}
"""Values of the network's own keys, with the files that read them."""


def kinds() -> dict[str, set[str]]:
    """Maps the name of each kind of part to its file."""
    found = {}
    for module in iter_modules(parts.__path__):
        members = vars(import_module(f"{parts.__name__}.{module.name}")).values()
        for part in members:
            if isinstance(part, type) and issubclass(part, Part) and "kind" in part.model_fields:
                for name in get_args(part.model_fields["kind"].annotation):  # none of a base
                    found[name] = {f"model/parts/{part.__module__.rpartition('.')[2]}.py"}
    return found


KINDS = kinds()
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for package in ROOT.glob("*/__init__.py")
    for path in package.parent.rglob("*.py")
}


def files_that_say(name: str) -> set[str]:
    said = {file for file, text in SOURCES.items() if re.search(rf"""["']{name}["']""", text)}
    return {file for file in said - OUTSIDE if not file.startswith("hf/")}


def test_every_kind_is_found() -> None:
    expected = (
        "rms layer scale fix rotary learned sinusoidal alibi relative none softmax gated plain linear llama3 yarn"
    )
    assert set(expected.split()) <= KINDS.keys()
    assert {"model/config.py", "parallel/tensor.py", "plan/memory.py", "training/loop.py"} <= SOURCES.keys()


@pytest.mark.parametrize("name", sorted(KINDS.keys() - COMMON))
def test_a_kind_is_named_in_its_file_and_in_the_unions_alone(name: str) -> None:
    found = files_that_say(name)
    assert KINDS[name] <= found
    assert found - KINDS[name] - OTHER_MEANINGS.get(name, set()) <= UNIONS


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_named_where_it_is_read(name: str) -> None:
    assert files_that_say(name) == CHOICES[name]
