"""The commands of docs/guides.md run as they are written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from backports import zstd
from json_tokenizers import LLAMA3, byte_level
from small_corpora import Prepared
from small_models import llama, random_weights, small_config

from triplane.data.open_tokenizer import open_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(prepared: Prepared, tmp_path: Path) -> Path:
    """A folder with the files that the guides name."""
    rows = [json.dumps({"text": text}) for text in prepared.texts[:300]]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "some.jsonl").write_text("\n".join(rows))
    (tmp_path / "docs.jsonl.zst").write_bytes(zstd.compress("\n".join(rows).encode()))
    (tmp_path / "llama").mkdir()
    tokenizer = open_tokenizer(byte_level(tmp_path / "llama" / "tokenizer.json", LLAMA3, prepared.texts))
    config = small_config(vocab_size=tokenizer.vocab_size)
    llama(config, random_weights(config)).save_pretrained(tmp_path / "llama")
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_guides(folder: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/guides.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 7
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = "set -ex\n" + "".join(blocks)
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
    commands = [line for line in "".join(blocks).splitlines() if line]
    assert len([line for line in ran.stderr.splitlines() if line.startswith("+ triplane")]) == len(commands)
    for published in ("runs/texts/report.html", "exports/more/model.safetensors", "1b.toml"):
        assert (folder / published).exists(), published
    assert shutil.which("triplane", path=path)
