"""`triplane train TEXT` makes what a run needs, by commands that it shows, and only once."""

import shutil
from pathlib import Path

import pytest
from commands import triplane
from small_corpora import Prepared

from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.tokenizer_training import train_tokenizer


def _commands(printed: str) -> list[str]:
    return [line.removeprefix("$ ") for line in printed.splitlines() if line.startswith("$ ")]


def test_two_commands_lead_from_text_to_a_sample(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "my texts" / "train").mkdir(parents=True)  # as data sets are laid out
    shutil.copy(prepared.source, tmp_path / "my texts" / "train")
    first = triplane("train", "my texts", "training.stop_at_step=1", "--device", "cpu", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert _commands(first.stdout) == [
        "triplane tokenizer train 'my texts' --out 'corpora/my texts.model'",
        "triplane prepare 'my texts' --out 'corpora/my texts' --tokenizer 'corpora/my texts.model'",
        "triplane init 'corpora/my texts' --out 'my texts.toml'",
        "triplane train 'my texts.toml'",
    ]
    sampled = triplane("generate", "runs/my texts", "--prompt", "The", "--tokens", "4", cwd=tmp_path)
    assert sampled.returncode == 0 and sampled.stdout.startswith("The"), sampled.stderr
    again = triplane("train", "my texts", "training.stop_at_step=2", "--device", "cpu", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert _commands(again.stdout) == [] and "my texts.toml exists: training what it says; " in again.stdout
    assert "resuming from" in again.stdout


def test_a_corpus_needs_only_a_config(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "words").symlink_to(prepared.folder)
    trained = triplane("train", "words", "training.stop_at_step=1", "--device", "cpu", cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    name = prepared.folder.name
    assert _commands(trained.stdout) == [f"triplane init words --out {name}.toml", f"triplane train {name}.toml"]


def test_what_is_no_text_is_refused_in_a_line(prepared: Prepared, tmp_path: Path) -> None:
    for folder in ("pictures", "run", "texts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pictures" / "one.png").touch()
    (tmp_path / "run" / "config.toml").touch()
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, environment, message in (
        ("pictures", {}, "pictures: contains no file that ends in .arrow"),
        ("run", {}, "run is the folder of a run; to resume it, give the config it was started with"),
        ("nowhere", {}, "nowhere: "),
        ("texts", ranks, "texts: under torchrun or srun give a config; `triplane init` writes one"),
    ):
        refused = triplane("train", name, cwd=tmp_path, **environment)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1, refused
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "run", "texts"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("A short text, " * 9, 288),  # what it allows
        (" ".join(f"{number**4:x}" for number in range(25_000)), 512),
        ("".join(map(chr, range(0x4E00, 0x5C00))) * 3, 4096),  # as many as its characters need
        ("\n".join(map(chr, range(0x4E00, 0x5120))), 1061),  # all of them, since none combine
    ],
    ids=["short", "a quarter of a million bytes", "many characters", "a character a line"],
)
def test_a_vocabulary_suits_the_text(text: str, size: int, tmp_path: Path) -> None:
    train_tokenizer([text], tmp_path / "t.model", vocab_size=None)
    assert open_tokenizer(tmp_path / "t.model").vocab_size == size
