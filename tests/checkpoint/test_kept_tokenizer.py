"""A checkpoint alone, far from its corpus, is sampled and exported."""

import json
import os
import shutil
from pathlib import Path

import pytest
from runs import small_run
from small_corpora import Prepared
from small_models import llama, random_weights, small_config
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the rank forks
from transformers import AutoTokenizer
from typer.testing import CliRunner

import triplane
from triplane.checkpoint.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from triplane.data.open_tokenizer import open_tokenizer
from triplane.launcher.cli import app
from triplane.launcher.run import train_on
from triplane.parallel import megatron, zero  # noqa: F401  imported before the rank forks
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.storage.errors import CheckpointError, ConfigError
from triplane.training.config import RunConfig

PHASES = [
    {"from_sequence": 16, "weights": [1.0], "seq_len": 64},
    {"from_sequence": 1600, "weights": [1.0], "seq_len": 128},
]


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def _call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def imported(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imports a Hugging Face folder with a licence and a tokenizer."""
    folder = tmp_path_factory.mktemp("import")
    config = small_config(vocab_size=prepared.tokenizer.vocab_size, n_heads=4, dim=32, hidden_dim=64)
    llama(config, random_weights(config), seq_len=48).save_pretrained(folder / "theirs")
    prepared.tokenizer.save(folder / "theirs")
    (folder / "theirs/README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Theirs\n")
    _call("import", folder / "theirs", folder / "start")
    return folder / "start"


@pytest.fixture(scope="module")
def alone(imported: Path, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run, begun from another model and in its second phase; corpus, run and parent are gone."""
    folder = tmp_path_factory.mktemp("alone")
    corpus = shutil.copytree(prepared.folder, folder / "corpus")
    start = shutil.copytree(imported, folder / "start")
    model = {"n_heads": 4, "dim": 32, "hidden_dim": 64, "n_kv_heads": 2}
    data = {"sources": [{"corpus": str(corpus)}], "phases": PHASES, "shuffle_window": 64}
    rules = {"every_steps": 2, "keep_last": 9, "initial": str(start)}
    stop = {"stop_at_step": 4, "eval_every_steps": 2}
    config = small_run(prepared, folder / "run", model=model, data=data, checkpoint=rules, training=stop)
    run_ranks(config.parallel, 1, _train, config)
    shutil.rmtree(start)
    longer = config.training.model_copy(update={"stop_at_step": 6})
    run_ranks(config.parallel, 1, _train, config.model_copy(update={"training": longer}))  # resumes without the parent
    checkpoint = Path((folder / "run/checkpoints/step_6").rename(folder / "step_6"))
    shutil.rmtree(folder / "run")
    shutil.rmtree(corpus)
    return checkpoint


def test_a_checkpoint_alone_is_sampled_and_exported(alone: Path, prepared: Prepared, tmp_path: Path) -> None:
    assert _call("generate", alone, "--prompt", "aei", "--tokens", "4").startswith("aei")
    _call("export", alone, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("aei out") == [prepared.tokenizer.bos_id, *prepared.tokenizer.encode("aei out")]
    with pytest.raises(Exception, match="corpus"):
        _call("evaluate", alone)


def test_an_export_reads_as_far_as_the_longest_phase_begun_and_names_its_parent(alone: Path, tmp_path: Path) -> None:
    _call("export", alone, tmp_path / "out")
    _call("export", alone, tmp_path / "longer", "--context", "96")
    lengths = [json.loads((tmp_path / name / "config.json").read_text())["max_position_embeddings"]
               for name in ("out", "longer")]  # fmt: skip
    assert lengths == [64, 96]
    card = (tmp_path / "out/README.md").read_text()
    assert "from the weights of theirs, whose licence is apache-2.0" in card and "from scratch" not in card


def test_an_imported_checkpoint_is_sampled_and_exported(imported: Path, tmp_path: Path) -> None:
    assert _call("generate", imported, "--prompt", "aei", "--tokens", "4").startswith("aei")
    _call("export", imported, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 48
    assert "license: apache-2.0" in (tmp_path / "out/README.md").read_text()


def test_a_damaged_or_absent_tokenizer_is_a_line_and_can_be_given(
    imported: Path, prepared: Prepared, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(imported, tmp_path / "start"))
    path = folder / "tokenizer.model"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"its tokenizer is damaged .* give another by --tokenizer"):
        _call("generate", folder)
    with pytest.raises(CheckpointError, match="its tokenizer is damaged"):
        _call("inspect", "--verify", folder)
    prepared.tokenizer.save(tmp_path)
    assert _call("generate", folder, "--tokenizer", tmp_path / "tokenizer.model", "--tokens", "2")
    manifest = read_manifest(folder)
    del manifest.state["run"]["tokenizer"]
    (folder / MANIFEST).unlink()
    write_manifest(folder, Manifest(manifest.state, manifest.boxes, manifest.file_bytes))
    with pytest.raises(CheckpointError, match=r"no tokenizer; give one by --tokenizer \(tokenizer= in Python\)"):
        _call("generate", folder)
    given = triplane.load(str(folder), tokenizer=str(tmp_path / "tokenizer.model"))
    assert given.tokenizer.digest == prepared.tokenizer.digest
    _call("export", folder, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.model")


def test_names_and_prompts_that_are_not_text(imported: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    for arguments in (("import", odd, tmp_path / "out"), ("import", imported, odd), ("export", imported, odd)):
        with pytest.raises(CheckpointError, match=r"/\\xff: not UTF-8; rename it"):
            _call(*arguments)
    with pytest.raises(ConfigError, match="--prompt: not UTF-8 at character 1"):
        _call("generate", imported, "--prompt", os.fsdecode(b"a\xff"))


def test_a_tokenizer_kept_is_the_one_that_was_given(imported: Path, prepared: Prepared) -> None:
    assert open_tokenizer(imported / "tokenizer.model").digest == prepared.tokenizer.digest
