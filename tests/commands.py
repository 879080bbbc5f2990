"""Runs `triplane` in a fork of this process, which saves the seconds that imports take."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile

import torch

from triplane.launcher.cli import main


def triplane(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Returns the output and exit code of a command."""
    command = ["triplane", *map(str, arguments)]
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            _become(command, cwd, out.fileno(), errors.fileno(), environment)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), errors.read())


def _become(command: list[str], cwd: Path, out: int, errors: int, environment: dict[str, str]) -> None:
    """Runs the command in this process and ends it."""
    code: object = 1
    try:
        for place, file in enumerate((out, errors), start=1):
            os.dup2(file, place)
        sys.stdout, sys.stderr, sys.argv = os.fdopen(1, "w"), os.fdopen(2, "w"), command
        os.chdir(cwd)
        os.environ |= environment
        # After a fork torch makes its pool of threads anew, and asserts if several threads are the first to need it.
        torch.set_num_threads(torch.get_num_threads())
        main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
