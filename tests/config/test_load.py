"""Loading a run config: what is accepted, and that each mistake is reported in one line that says where."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triplane.config.explain import _subtables
from triplane.config.load import load_config
from triplane.storage.errors import ConfigError
from triplane.training.config import RunConfig

GOOD = """\
run_dir = "runs/a"
[model]
vocab_size = 100
dim = 32
n_layers = 4
n_heads = 4
n_kv_heads = 2
head_dim = 8
hidden_dim = 64
[data]
sources = [{ corpus = "corpora/a" }]
seq_len = 16
[training]
steps = 10
global_batch_size = 8
micro_batch_size = 2
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("a.toml").write_text(text)
        return Path("a.toml")

    return write


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_tables_with_defaults_may_be_left_out(write: Callable[..., Path]) -> None:
    config = load_config(write(GOOD))
    assert config.seed == 0 and config.parallel.dp == "auto" and config.checkpoint.keep_last == 2


def test_an_integer_serves_as_a_float(write: Callable[..., Path]) -> None:
    assert load_config(write(GOOD), ["model.rope_base=500000"]).model.positions.base == 500_000.0


def test_overrides_are_toml_values_or_bare_strings(write: Callable[..., Path]) -> None:
    overrides = [
        "run_dir = runs/b",
        'data.sources=[{corpus="c=d"}]',
        "model.tie_embeddings=true",
        "optimizer.lr=1e-2",
        "parallel.dp=3",
        "seed=1",
        "seed=2",
        'model.rope_scaling={kind="linear", factor=2.0}',
        "model.rope_scaling.factor=4.0",
    ]
    config = load_config(write(GOOD), overrides)
    assert (config.run_dir, config.data.sources[0].corpus, config.model.tie_embeddings) == ("runs/b", "c=d", True)
    assert (config.optimizer.lr, config.parallel.dp, config.seed) == (0.01, 3, 2)
    assert config.model.positions.scaling.factor == 4.0


def test_every_problem_is_named_at_once(write: Callable[..., Path]) -> None:
    text = GOOD.replace("dim = 32\n", 'dim = "32"\n').replace("n_layers = 4", "n_layers = true")
    text = text.replace('corpus = "corpora/a"', "") + "n_headz = 3\nlr = 1\n[parallel]\ndp = 0\nzero = 4\n[rope]\n"
    assert problems(write(text), "model.n_headz=2", "model.vocab_size=many", "nonsense", "run_dir.x=1", "a..b=1") == [
        "override 'nonsense': give it as key.path=value, for example optimizer.lr=1e-3",
        "override 'a..b=1': give it as key.path=value, for example optimizer.lr=1e-3",
        "override: run_dir.x: run_dir is a value, not a table; set run_dir itself",
        'override: model.vocab_size: "many" given; should be a valid integer',
        'a.toml: model.dim: "32" given; should be a valid integer',
        "a.toml: model.n_layers: true given; should be a valid integer",
        "override: model.n_headz: unknown key; did you mean n_heads?",
        "a.toml: data.sources[0].corpus: missing. Folder written by `triplane prepare`, or its fsspec URL "
        "(`https://...`, `s3://...`, `gs://...`)",
        "a.toml: parallel.dp: 0 given; should be greater than 0 or 'auto'",
        "a.toml: parallel.zero: 4 given; should be 0, 1, 2 or 3",
        "a.toml: training.n_headz: unknown key; known here: steps, global_batch_size, batch_ramp, micro_batch_size, "
        "precision, log_every_steps, eval_every_steps, eval_sequences, sample_every_steps, noise_scale_every_steps, "
        "prometheus_port, stop_at_step",
        "a.toml: training.lr: unknown key; did you mean optimizer.lr?",
        "a.toml: rope: unknown key; known here: run_dir, seed, tracking, model, data, parallel, optimizer, schedule, "
        "training, checkpoint, faults, profile",
    ]


def test_a_missing_or_wrong_table_says_what_it_needs(write: Callable[..., Path]) -> None:
    text = GOOD[: GOOD.index("[training]")] + "[model.rope_scaling]\nkind = 'yearn'\n"
    assert problems(write(text), "data=3") == [
        'a.toml: model.rope_scaling: kind is "yearn"; did you mean yarn?',
        "override: data: 3 given; should be a table, [data]",
        "a.toml: training: missing table; it requires steps, global_batch_size, micro_batch_size",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "data.shuffle_window=99999999999999999999",
        "data.cache_gib=1e300",
        "data.num_workers=99999",
        'data.sources=[{corpus="a", weight=1e308}]',
        "data.phases=[{from_sequence=8, weights=[1e308]}]",
        "data.phases=[{from_sequence=8, weights=[1], seq_len=4611686018427387904}]",
        "data.seq_len=4611686018427387904",
        "model.n_layers=1000000",
        "model.vocab_size=99999999999",
        "model.dim=99999999999",
        "training.steps=99999999999999999999999",
        "training.global_batch_size=99999999999",
        "training.micro_batch_size=99999999999",
    ],
)
def test_what_no_machine_can_count_is_out_of_bounds(write: Callable[..., Path], override: str) -> None:
    (problem,) = problems(write(GOOD), override)
    assert "given; should be less than or equal to" in problem


def test_bad_toml_is_placed_and_told_with_bad_overrides(write: Callable[..., Path]) -> None:
    syntax, override = problems(write('run_dir = "a\n'), "x")
    assert syntax.startswith("a.toml: not TOML: ") and "line 1" in syntax
    assert override.startswith("override 'x'")


def test_a_text_without_a_suffix_is_told_from_a_config(tmp_path: Path) -> None:
    (tmp_path / "enwik8").write_text("<mediawiki> a text")
    (problem,) = problems(tmp_path / "enwik8")
    assert "not TOML: " in problem and problem.endswith("; to train on a text, let its name end in .txt")


def test_an_absent_file_brings_near_names(write: Callable[..., Path]) -> None:
    write(GOOD)
    assert problems(Path("b.toml")) == ["b.toml: no such file; did you mean a.toml?"]
    assert problems(Path("configs/b.toml")) == ["configs/b.toml: no such file; no .toml file is near"]


def test_unreadable_files_are_user_errors(write: Callable[..., Path], tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path}: Is a directory; give a TOML file"]
    path = write(GOOD)
    path.write_bytes(b"\xff")
    assert problems(path) == ["a.toml: not UTF-8 text: invalid start byte at byte 0"]


def test_loading_imports_nothing_heavy(write: Callable[..., Path]) -> None:
    path = write(GOOD)
    code = (
        "import sys; from pathlib import Path; from triplane.config.checks import check;"
        "from triplane.config.load import load_config;"
        f"check(load_config(Path({str(path)!r})), 1);"
        "print({'torch', 'numpy', 'megatron', 'deepspeed', 'webdataset', 'sentencepiece'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_what_checks_a_run_imports_no_torch() -> None:
    imports = "sys, triplane.launcher.train, triplane.slurm.submit, triplane.plan.command"
    code = f"import {imports}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_every_key_is_documented() -> None:
    def undocumented(table: Any, prefix: str = "") -> Iterator[str]:
        for name, field in table.model_fields.items():
            if not field.description:
                yield prefix + name
            for below in _subtables(table, name):
                yield from undocumented(below, f"{prefix}{name}.")

    assert list(undocumented(RunConfig)) == []
