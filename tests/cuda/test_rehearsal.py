"""The engine's step on GPUs that are not there: every layout runs, and the host waits no more often than it must."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from triplane.parallel.devices import missing_to_compile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # all cases run for the first test
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
    pytest.mark.skipif(missing_to_compile(on_gpu=False) is not None, reason="no C++ compiler for the guard"),
]

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": ({"layout": {}}, 0),
    "fp32": ({"layout": {}, "precision": "fp32"}, 0),
    "packed, tied": ({"layout": {}, "packed": True, "tied": True}, 0),
    "selective, biased": ({"layout": {"recompute": "selective"}, "biased": True}, 0),
    "full, packed": ({"layout": {"recompute": "full"}, "packed": True}, 0),
    "fp8, selective": ({"layout": {"fp8": True, "recompute": "selective"}}, 0),
    "fp8, tp, selective": (
        {"layout": {"fp8": True, "tp": 2, "sequence_parallel": True, "recompute": "selective"}, "biased": True},
        0,
    ),
    "fp8, experts": ({"layout": {"fp8": True, "dp": 8, "zero": 3}, "experts": True}, 0),
    "tp": ({"layout": {"tp": 2}}, 0),
    "tp + sequence, selective": (
        {"layout": {"tp": 2, "sequence_parallel": True, "recompute": "selective"}, "packed": True},
        0,
    ),
    "ulysses": ({"layout": {"cp": 2}, "packed": True}, 0),
    "ring": ({"layout": {"cp": 2, "cp_method": "ring"}, "packed": True}, 0),
    "pp, first stage": ({"layout": {"pp": 2}}, 0),
    "pp, last stage, tied": ({"layout": {"pp": 2}, "rank": 1, "tied": True}, 0),
    "virtual stages": ({"layout": {"pp": 2, "virtual_stages": 2}}, 0),
    "zero 0": ({"layout": {"dp": 2, "zero": 0}}, 0),
    "zero 0, bf16": ({"layout": {"dp": 2, "zero": 0}, "precision": "bf16"}, 0),
    "zero 1": ({"layout": {"dp": 8}}, 0),
    "zero 2": ({"layout": {"dp": 8, "zero": 2}}, 0),
    "zero 2 in groups": ({"layout": {"dp": 8, "dp_shard": 4, "zero": 2}}, 0),
    "zero 3": ({"layout": {"dp": 8, "zero": 3}}, 0),
    "zero 3, tied, full": ({"layout": {"dp": 8, "zero": 3, "recompute": "full"}, "packed": True, "tied": True}, 0),
    "zero 3, selective": ({"layout": {"dp": 8, "zero": 3, "recompute": "selective"}, "packed": True}, 0),
    "zero 3, first stage": ({"layout": {"pp": 2, "dp": 2, "zero": 3}}, 0),
    "zero 3, virtual stages, tied": (
        {"layout": {"pp": 2, "dp": 2, "zero": 3, "virtual_stages": 2}, "rank": 2, "tied": True},
        0,
    ),
    "zero 3, offload": ({"layout": {"dp": 8, "zero": 3, "offload_optimizer": True}}, 0),
    "offload": ({"layout": {"offload_optimizer": True}}, 83),
    "offload in groups": ({"layout": {"dp": 8, "dp_shard": 4, "zero": 2, "offload_optimizer": True}}, 0),
    "all axes": (
        {"layout": {"tp": 2, "sequence_parallel": True, "cp": 2, "pp": 2, "dp": 2, "recompute": "full"}, "tied": True},
        0,
    ),
}
"""Each case, and how often its libraries may wait in a step of two micro-batches. The numbers only fall."""
OWN = {"offload": 2, "offload in groups": 1 + 3, "zero 3, offload": 1 + 80}
"""Waits on lines of ours, where there are more than one, that for the verdict on the step before. FSDP2 waits in
`loss.backward()`, twice for each of 39 gradients: to copy it, and to add the second to the first."""
PLANTS: dict[str, dict[str, Any]] = {plant: {"layout": {}, "plant": plant} for plant in ("tensor_on_the_host", "item")}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cases = {name: case for name, (case, _) in CASES.items()} | PLANTS
    program = Path(__file__).with_name("rehearsal.py")
    command = [sys.executable, str(program), str(tmp_path_factory.mktemp("guard")), *map(json.dumps, cases.values())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(zip(cases, map(json.loads, ran.stdout.splitlines()), strict=True))


def waits(found: dict[str, Any]) -> Counter[str]:
    """How often each owner's code waits in a step."""
    count: Counter[str] = Counter()
    for phase, owner, _, _, times in found["waits"]:
        if phase != "snapshot":
            count[owner] += times
    return count


def table(found: dict[str, Any]) -> str:
    return "\n".join(f"{times} x {phase}: {what} at {place}" for phase, _, what, place, times in found["waits"])


@pytest.mark.parametrize("name", CASES)
def test_a_step_runs_and_waits_no_more_than_it_must(name: str, rehearsed: dict[str, dict[str, Any]]) -> None:
    found = rehearsed[name]
    assert not found["error"]
    count = waits(found)
    assert count.pop("triplane") == OWN.get(name, 1), table(found)
    assert sum(count.values()) == CASES[name][1], f"if there are fewer, lower the number:\n{table(found)}"


@pytest.mark.parametrize("name", CASES)
def test_what_goes_to_and_fro_does_not_grow_with_the_layers(name: str, rehearsed: dict[str, dict[str, Any]]) -> None:
    """Batches go to the GPU, a verdict comes back; an offloaded state travels besides."""
    copies = {(phase, to): count for phase, to, count in rehearsed[name]["copies"] if phase != "snapshot"}
    if "offload" not in name:
        assert copies == {("data", "to the GPU"): 10, ("agreement", "to the host"): 1}


def test_a_save_copies_without_waiting_and_on_its_own_gpu(rehearsed: dict[str, dict[str, Any]]) -> None:
    """A thread that names no GPU takes memory of the first one."""
    found = rehearsed["one rank"]
    assert [wait[1:3] for wait in found["waits"] if wait[0] == "snapshot"] == [["triplane", "Stream.synchronize"]]
    assert found["selected"].count("snapshot") == 1


def operators(found: dict[str, Any], phase: str) -> Counter[str]:
    return Counter({name: count for where, name, count in found["operators"] if where == phase})


@pytest.mark.parametrize(
    ("name", "product", "expected"),
    [
        ("selective, biased", "aten.addmm.default", 3),
        ("fp8, selective", "aten._scaled_mm.default", 7 * 3),
        ("fp8, tp, selective", "aten._scaled_mm.default", 7 * 3),
        ("fp8, experts", "aten._scaled_mm.default", (4 + 3) * 3),  # of attention and the shared expert
        ("fp8, experts", "triplane.grouped_product.default", 3),
    ],
)
def test_each_product_is_computed_once(
    name: str, product: str, expected: int, rehearsed: dict[str, dict[str, Any]]
) -> None:
    """Two micro-batches of four layers: three biased projections, or all and two products for each's gradients."""
    assert operators(rehearsed[name], "forward_backward")[product] == 2 * 4 * expected


def test_a_tensor_on_the_host_is_caught(rehearsed: dict[str, dict[str, Any]]) -> None:
    assert "found at least two devices, cuda:0 and cpu" in rehearsed["tensor_on_the_host"]["error"]


def test_a_value_that_is_read_is_caught_with_its_line(rehearsed: dict[str, dict[str, Any]]) -> None:
    found = [wait for wait in rehearsed["item"]["waits"] if wait[0] == "forward_backward"]
    assert found == [
        [
            "forward_backward",
            "triplane",
            "aten._local_scalar_dense.default",
            "tests/cuda/plants.py:21 assert total.item() is not None",
            1,
        ]
    ]
