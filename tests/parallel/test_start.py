"""Imports of a rank before its first step."""

import subprocess
import sys


def test_the_adapters_load_neither_compiler_nor_tracker_and_leave_them_as_they_were() -> None:
    program = (
        "import sys, torch; compiled = torch.compile; from triplane.parallel import megatron, zero; "
        "assert torch.compile is compiled; assert 'torch._inductor.compile_fx' not in sys.modules; "
        "assert 'wandb' not in sys.modules; import wandb"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_what_is_imported_uncompiled_prints_nothing() -> None:
    program = (
        "from triplane.parallel.uncompiled import importing_uncompiled\nwith importing_uncompiled():\n    import this\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
