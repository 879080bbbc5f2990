"""The commands and programs of docs/guides.md run as they are written."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from backports import zstd
from commands import triplane
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
@pytest.mark.timeout(900)
def test_the_commands_of_the_guides(folder: Path) -> None:
    guides = (ROOT / "docs/guides.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", guides, flags=re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(blocks) >= 7 and {program for program, *_ in commands} == {"triplane"}
    for _, *arguments in commands:
        few = ["training.steps=4"] if arguments[0] == "train" and arguments[1] in ("docs.toml", "more.toml") else []
        ran = triplane(*arguments, *few, cwd=folder, CUDA_VISIBLE_DEVICES="")
        assert ran.returncode == 0, f"{arguments}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
    for published in ("runs/texts/report.html", "exports/more/model.safetensors", "1b.toml"):
        assert (folder / published).exists(), published
    for program in re.findall(r"```python\n(.*?)```", guides, flags=re.DOTALL):
        ran = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
