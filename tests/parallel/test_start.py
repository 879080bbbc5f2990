"""Imports of a rank before its first step."""

import subprocess
import sys


def test_the_adapters_do_not_load_the_compiler_and_leave_it_as_it_was() -> None:
    program = (
        "import sys, torch; compiled = torch.compile; from triplane.parallel import megatron, zero; "
        "assert torch.compile is compiled; assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_what_is_imported_uncompiled_prints_nothing() -> None:
    program = (
        "from triplane.parallel.uncompiled import importing_uncompiled\nwith importing_uncompiled():\n    import this\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
