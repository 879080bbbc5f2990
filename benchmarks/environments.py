"""A Python environment for each peer, with pins, in the user's cache: no two peers agree on versions of libraries."""

import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

PEERS = {
    "litgpt": ("litgpt==0.5.13", "lightning==2.6.6"),
    "Hugging Face": ("transformers==5.23.0", "accelerate==1.15.0"),
}
"""Packages beside torch, by the word that the peer's contenders begin with."""
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "triplane", "benchmarks")


def set_up() -> None:
    """Makes the peers' environments, with the torch of this one."""
    torch = version("torch").partition("+")[0]
    for peer, packages in PEERS.items():
        folder = _folder(peer)
        venv.create(folder, clear=True, with_pip=True)
        command = [folder / "bin/python", "-m", "pip", "install", "--quiet", f"torch=={torch}", *packages]
        subprocess.run(command, check=True)
        print(f"{folder}: torch {torch}, {', '.join(packages)}", flush=True)


def python(name: str) -> Path:
    """Returns the interpreter of a contender's environment."""
    own = [_folder(peer) / "bin/python" for peer in PEERS if name.startswith(peer)]
    return own[0] if own else Path(sys.executable)


def _folder(peer: str) -> Path:
    return ENVIRONMENTS / peer.replace(" ", "-")  # torch's compiler cannot link to libraries in a path with spaces
