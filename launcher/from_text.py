"""`triplane train TEXT`: makes a tokenizer, a corpus and a config, each by the command that one would give."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from triplane.config.overrides import Override
from triplane.data.manifest import MANIFEST_NAME
from triplane.data.sources import FORMATS, format_of
from triplane.parallel.ranks import current_rank
from triplane.storage.errors import ConfigError
from triplane.training.exits import leave
from triplane.training.run_folder import RunFolder


def is_text(path: Path) -> bool:
    """Returns True for a folder, or a file that `triplane prepare` reads by its suffix."""
    return path.is_dir() or (path.is_file() and format_of(path.name) in FORMATS)


def config_of_text(text: Path, overrides: list[str]) -> Path:
    """Returns the config of a run on a folder or file of text, or on a corpus. What is there already is kept.

    Leaves with the exit code of a command that fails. Raises ConfigError before the first if an override is invalid.
    """
    for override in overrides:
        Override.parse(override)
    if RunFolder(text).config.exists():
        raise ConfigError(f"{text} is the folder of a run; to resume it, give the config it was started with")
    if text.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(f"{text} holds the working folder, where the run would be written: start it from another")
    name = text.resolve().stem if text.is_file() else text.resolve().name
    config = Path(f"{name}.toml")
    if config.exists():
        print(f"{config} exists: training what it says; move it away for another text of this name", flush=True)
        return config
    if current_rank(os.environ) is not None:
        raise ConfigError(f"{text}: under torchrun or srun give a config; `triplane init` writes one")
    corpus = text
    if not (text / "train" / MANIFEST_NAME).exists():
        corpus = Path("corpora") / name
        tokenizer = corpus.with_name(f"{name}.model")
        if not tokenizer.exists():
            _run("tokenizer", "train", text, "--out", tokenizer)
        _run("prepare", text, "--out", corpus, "--tokenizer", tokenizer)
    _run("init", corpus, "--out", config)
    run = shlex.quote(f"runs/{config.stem}")
    print(f"\n$ triplane train {shlex.quote(str(config))}\nThen: triplane generate {run} --prompt TEXT", flush=True)
    return config


def _run(*arguments: object) -> None:
    """Shows and runs a command of triplane."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ triplane {shlex.join(words)}", flush=True)
    if code := subprocess.run([sys.executable, "-m", "triplane", *words], check=False).returncode:
        leave(code if code > 0 else 128 - code)
