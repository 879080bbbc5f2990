"""Which GPU a rank takes, and what is refused before any rank starts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import small_run
from small_corpora import Prepared
from small_models import small_config

from triplane.config.checks import check
from triplane.launcher.cores import cores_of_ranks
from triplane.model.parts.experts import Experts
from triplane.parallel.config import ParallelConfig
from triplane.parallel.devices import gpu_number, missing_to_compile, problems_of_devices
from triplane.parallel.ranks import Rank
from triplane.parallel.rules import Devices, device_problems, layout_problems
from triplane.training.hardware import data_sheet_flops_per_s, newest_flash_attention, room_for_weights

H100, A100, CPU = (9, 0), (8, 0), Devices(0, None)
TORCHRUN = Rank(rank=5, world_size=8, local_rank=1, local_size=4)
SLURM = replace(TORCHRUN, shown_apart=True)


@pytest.mark.parametrize(
    ("rank", "visible", "expected"),
    [
        (TORCHRUN, 4, 1),
        (TORCHRUN, 8, 1),
        (TORCHRUN, 2, None),  # the other ranks of this machine find none
        (TORCHRUN, 1, None),
        (SLURM, 4, 1),
        (SLURM, 1, 0),  # --gpus-per-task=1
        (SLURM, 2, None),
        (Rank(0, 1, 0), 1, 0),
    ],
)
def test_a_rank_takes_a_gpu_of_its_own(rank: Rank, visible: int, expected: int | None) -> None:
    assert gpu_number(rank, visible) == expected


def test_more_ranks_than_gpus_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path, parallel={"dp": 2})
    (problem,) = problems_of_devices(config.parallel, "auto", Devices(1, H100), rank=None, ranks=2)
    assert problem.startswith("2 ranks on this machine, but one GPU is visible; start fewer (parallel.dp=1 ")
    assert problem.endswith("or train on the CPU with --device cpu")
    (problem,) = problems_of_devices(config.parallel, "auto", Devices(2, H100), rank=TORCHRUN, ranks=8)
    assert problem.startswith("4 ranks on this machine, this one number 1, but 2 GPUs are visible")
    for rank, ranks, devices in ((None, 2, Devices(2, H100)), (SLURM, 8, Devices(1, H100)), (None, 2, CPU)):
        assert list(problems_of_devices(config.parallel, "auto", devices, rank=rank, ranks=ranks)) == []


@pytest.mark.parametrize(
    ("layout", "precision", "devices", "problem"),
    [
        ({"cp": 2, "cp_method": "ring"}, "fp32", Devices(8, H100), 'use precision bf16, or "ulysses"'),
        ({"cp": 2, "cp_method": "ring", "zero": 0}, "auto", Devices(8, H100), None),
        ({"cp": 2, "cp_method": "ring"}, "auto", Devices(8, H100), None),
        ({"cp": 2, "cp_method": "ring"}, "fp32", CPU, None),
        ({"cp": 2}, "fp32", Devices(8, H100), None),
        ({"fp8": True}, "bf16", Devices(8, H100), None),
        ({"fp8": True}, "bf16", Devices(8, (8, 9)), None),
        ({"fp8": True}, "bf16", Devices(8, A100), "compute capability 8.9 or more, not 8.0; set parallel.fp8=false"),
        ({"fp8": True}, "bf16", CPU, "compute capability 8.9 or more, not a CPU; set parallel.fp8=false"),
    ],
)
def test_what_devices_cannot_do_is_known_before(
    layout: dict[str, Any], precision: str, devices: Devices, problem: str | None
) -> None:
    found = list(device_problems(ParallelConfig(**layout), precision, devices))
    assert len(found) == (problem is not None)
    assert all(str(problem) in line for line in found)


def test_widths_and_tokens_that_fp8_kernels_do_not_take_are_known_before(prepared: Prepared, tmp_path: Path) -> None:
    model = {"hidden_dim": 72, "dim": 48, "n_heads": 6, "n_kv_heads": 2, "head_dim": 12}
    changes: dict[str, Any] = {"model": model, "parallel": {"fp8": True}, "training": {"precision": "bf16"}}
    config = small_run(prepared, tmp_path, **changes)
    assert [line.split(";")[0] for line in check(config, 1) if "fp8" in line] == [
        "fp8: n_heads x head_dim (72) is not a multiple of 16, which its kernels require",
        "fp8: n_kv_heads x head_dim (24) is not a multiple of 16, which its kernels require",
        "fp8: hidden_dim (72) is not a multiple of 16, which its kernels require",
    ]
    odd = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": 24})})
    odd = odd.model_copy(update={"training": odd.training.model_copy(update={"micro_batch_size": 1})})
    assert any("x seq_len (24) (24) is not a multiple of 16 x cp (1), for fp8" in x for x in check(odd, 1))


def test_fp8_multiplies_the_share_of_a_rank() -> None:
    """Of fewer key heads than ranks a rank multiplies one; the widths of routed experts do not matter."""
    model = small_config(n_heads=4, n_kv_heads=2, head_dim=24, hidden_dim=48)
    found = [line.split(";")[0] for line in layout_problems(model, ParallelConfig(tp=4, fp8=True), "bf16")]
    assert found == [
        "fp8: n_heads x head_dim (96) is not a multiple of 16 x tp (4), which its kernels require",
        "fp8: n_kv_heads x head_dim (48) is not a multiple of 16 x n_kv_heads (2), which its kernels require",
        "fp8: hidden_dim (48) is not a multiple of 16 x tp (4), which its kernels require",
    ]
    heads = {"n_heads": 4, "n_kv_heads": 1, "head_dim": 16}
    for shared, problem in ((4, None), (2, "hidden_dim (48) is not a multiple of 16 x tp (2)")):
        experts = Experts(n_experts=4, active=2, hidden_dim=24, shared=shared, shared_gate=True)
        model = small_config(feed_forward=experts, **heads)
        found = list(layout_problems(model, ParallelConfig(tp=2, ep=2, fp8=True), "bf16"))
        assert [str(problem) in line for line in found] == [True] * (problem is not None)


def test_a_cpu_can_be_asked_for() -> None:
    """Before torch has looked for GPUs, so that no part of the program finds one."""
    program = (
        "import sys; from triplane.parallel import devices; assert 'torch' not in sys.modules; devices.use_cpu(); "
        "print(devices.visible_devices())"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "Devices(gpus=0, capability=None)\n"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name: str, tflops: int | None) -> None:
    found = data_sheet_flops_per_s(name)
    assert (None if found is None else found / 1e12) == tflops


def test_ranks_are_not_bound_where_the_topology_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("triplane.launcher.cores._TOPOLOGY", tmp_path)
    assert cores_of_ranks(2) == [set(), set()]
    assert "ranks are not bound to cores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("billions", "free_gib", "expected"),
    [
        (1, None, ("cpu", "fp32", None)),
        (1, 10, ("cuda", "fp32", None)),
        (8, 24, ("cuda", "bf16", "in bf16: its fp32 weights take 29.8 GiB, of which the GPU has 24.0 free")),
        (70, 79, ("cpu", "fp32", "on the CPU: its fp32 weights take 260.8 GiB, of which the GPU has 79.0 free")),
    ],
)
def test_a_whole_model_is_read_where_it_fits(billions: int, free_gib: int | None, expected: tuple[Any, ...]) -> None:
    assert room_for_weights(billions * 10**9, None if free_gib is None else free_gib * 2**30) == expected


@pytest.mark.parametrize(
    ("devices", "environment", "missing"),
    [
        (CPU, {"PATH": ""}, "a compiler (g++)"),
        (Devices(2, H100), {"PATH": ""}, "a compiler (gcc or clang)"),
        (CPU, {"CXX": "icpx"}, "the compiler CXX=icpx"),
        (Devices(2, H100), {"CC": "nvc"}, "the compiler CC=nvc"),
    ],
)
def test_compiling_without_a_compiler_is_refused(
    devices: Devices, environment: dict[str, str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    layout = ParallelConfig(dp=2, compile=True)
    (problem,) = problems_of_devices(layout, "auto", devices, rank=None, ranks=2)
    assert problem == (
        f"parallel.compile requires {missing}, which is not here; install it, or set parallel.compile=false"
    )


def test_compiling_without_pythons_headers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    for name in ("gcc", "g++"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        missing_to_compile(on_gpu=True) == missing_to_compile(on_gpu=False) == f"Python's headers ({tmp_path}/Python.h)"
    )
    (tmp_path / "Python.h").touch()
    assert missing_to_compile(on_gpu=True) is missing_to_compile(on_gpu=False) is None


def test_compiling_with_torch_in_a_path_with_spaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = "/my tools/torch/__init__.py"
    monkeypatch.setattr("triplane.parallel.devices.find_spec", lambda name: SimpleNamespace(origin=origin))
    missing = f"torch in a path without spaces ({origin}), to which it links its C++"
    assert missing_to_compile(on_gpu=False) == missing


@pytest.fixture
def nothing_imported() -> None:
    """Forgets the packages of another test."""
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]


_FLASH_3 = """
from torch.library import Library
library = Library("flash_attn_3", "DEF")
for name in ("fwd", "bwd"):
    library.define(f"{name}(Tensor x) -> Tensor")
"""


@pytest.mark.usefixtures("nothing_imported")
@pytest.mark.parametrize("where", ["flash_attn/__init__.py", "flash_attn/cute/__init__.py", "flash_attn/cute.py"])
def test_flash_attention_that_cannot_be_used_is_told(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / where).parent.mkdir(parents=True)
    (tmp_path / "flash_attn/__init__.py").touch()
    (tmp_path / where).write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    said = newest_flash_attention(torch.device("cuda", 0))
    assert said is not None and said.startswith("FA4 is installed but cannot be used: ")
    assert said.endswith("; attention runs on torch's own")
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.usefixtures("nothing_imported")
@pytest.mark.parametrize(("capability", "expected"), [((8, 0), None), ((9, 0), "FA3"), ((10, 0), None)])
def test_flash_attention_is_the_newest_that_is_installed_and_fits(
    capability: tuple[int, int], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text(_FLASH_3)
    (tmp_path / "flash_attn").mkdir()  # the second, without the fourth's `cute`
    (tmp_path / "flash_attn/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    try:
        said = f"attention runs on {expected}, which is installed here" if expected else None
        assert newest_flash_attention(torch.device("cuda", 0)) == said
        assert torch.nn.attention.current_flash_attention_impl() == expected
        assert newest_flash_attention(torch.device("cpu")) is None
    finally:
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
