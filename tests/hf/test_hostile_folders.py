"""Hugging Face folders with seeded changes: one line and nothing left, or an import that is proven."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mutations import mutate
from small_corpora import Prepared
from small_models import llama, random_weights, small_config
from typer.testing import CliRunner

from triplane.hf.tokenizer import hf_files
from triplane.launcher.cli import app
from triplane.storage.errors import TriplaneError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Llama in one file, a Qwen2 in several, and a Mistral, each with a tokenizer and a card."""
    folder = tmp_path_factory.mktemp("hf")
    found = []
    for name, biased, size in (("llama", False, "1GB"), ("qwen2", True, "40KB"), ("mistral", False, "40KB")):
        config = small_config(vocab_size=prepared.tokenizer.vocab_size, dim=24, hidden_dim=16, qkv_bias=biased)
        llama(config, random_weights(config)).save_pretrained(folder / name, max_shard_size=size)
        (folder / name / "README.md").write_text("---\nlicense: mit\n---\n")
        prepared.tokenizer.save(folder / name)
        for file, content in hf_files(prepared.tokenizer).items():
            (folder / name / file).write_bytes(content)
        found.append(folder / name)
    path = found[2] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": None}))
    return found


def _rewrite(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(mutate(json.loads(path.read_text()), draw, draw.randint(1, 3))))


def _header(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(mutate(json.loads(data[8 : 8 + length]), draw, draw.randint(1, 3))).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _length(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.choice([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + path.read_bytes()[8:])


def _cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def _replaced(path: Path, draw: random.Random) -> None:
    path.unlink()
    odd: list[Callable[[Path], object]] = [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(draw.randbytes(300)),
        lambda path: path.write_text("[" * 200_000),
        lambda path: path.write_text('{"a":' * 200_000),
        lambda path: None,
    ]
    draw.choice(odd)(path)


def _swapped(path: Path, draw: random.Random) -> None:
    other = draw.choice(sorted(file for file in path.parent.iterdir() if file.is_file() and file != path))
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def _values(path: Path, draw: random.Random) -> None:
    """Bytes of weights: other numbers, some not finite."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = draw.randrange(start, len(data) - 4) // 4 * 4
    data[at : at + 4] = draw.choice([b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0"])
    path.write_bytes(data)


def _changes(folder: Path, draw: random.Random) -> Iterator[tuple[Path, Callable[[Path, random.Random], None]]]:
    """Every kind of change with its file, config.json more often than the others."""
    yield from [(folder / "config.json", _rewrite)] * 4
    for path in sorted(folder.iterdir()):
        yield path, draw.choice([_replaced, _swapped, _cut])
        if path.suffix == ".json":
            yield path, _rewrite
        if path.suffix == ".safetensors":
            yield path, draw.choice([_header, _length, _values])


@pytest.mark.parametrize("seed", range(120))
def test_a_changed_folder_is_a_line_or_a_proven_import(seed: int, folders: list[Path], tmp_path: Path) -> None:
    draw = random.Random(seed)
    folder = Path(shutil.copytree(draw.choice(folders), tmp_path / "hf"))
    path, change = draw.choice(list(_changes(folder, draw)))
    change(path, draw)
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "out/start")])
    error: Any = result.exception
    told = f"{change.__name__} {path.name}: {error!r}"
    if error is None:
        assert "by transformers" in result.output, told
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["start"]
        return
    assert isinstance(error, TriplaneError), told
    assert str(error) and "\n" not in str(error), told
    assert list((tmp_path / "out").iterdir()) == [], told
