"""The config that `triplane init` writes trains as it is, and its values follow the rules that it names."""

import tomllib
from pathlib import Path

import pytest
from commands import triplane
from small_corpora import Prepared
from small_models import llama, random_weights, small_config

from triplane.config.checks import check, tokens_per_step
from triplane.config.load import load_config
from triplane.config.preflight import done_steps
from triplane.model.count import count_parameters
from triplane.plan import init
from triplane.plan.choices import Cluster, Start, Text, choose, values
from triplane.plan.gpus import GPUS
from triplane.plan.sizes import SIZES
from triplane.training.config import RunConfig

SIZED = [("1m", 1024, 1e6), ("10m", 8192, 1e7), ("125m", 32_768, 1.25e8), ("1b", 32_768, 1.1e9), ("8b", 32_768, 8e9)]


def test_a_folder_of_text_is_prepared_and_trained(prepared: Prepared, tmp_path: Path) -> None:
    options = ("--out", "corpus", "--tokenizer", prepared.folder / "tokenizer.model")
    assert triplane("prepare", prepared.source, *options, cwd=tmp_path).returncode == 0
    written = triplane("init", "corpus", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("config.toml: ") and written.stdout.endswith("by `triplane train config.toml`\n")
    dry = triplane("train", "config.toml", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    trained = triplane("train", "config.toml", "training.stop_at_step=3", "--device", "cpu", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "warning" not in trained.stdout
    config = load_config(tmp_path / "config.toml")
    assert done_steps(config.model_copy(update={"run_dir": str(tmp_path / config.run_dir)})) == 3
    assert "exists; remove it or give another --out" in triplane("init", "corpus", cwd=tmp_path).stderr


def test_a_long_run_on_cpus_is_compiled_where_there_is_a_compiler(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out, missing in (("with.toml", None), ("without.toml", "a compiler")):
        monkeypatch.setattr(init, "missing_to_compile", lambda *, on_gpu, missing=missing: missing)
        init.init(str(prepared.folder), tmp_path / out, size="1m", initial=None, gpus=None, kind=None)
        assert load_config(tmp_path / out).parallel.compile == (missing is None)


def test_a_config_for_gpus_passes_the_plan(prepared: Prepared, tmp_path: Path) -> None:
    cluster = ("--gpus", 8, "--gpu", "h100")
    written = triplane("init", prepared.folder, "--size", "1b", *cluster, "--out", "big/1b.toml", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    elsewhere = "checkpoint.folder=memory://run"  # the disk of this machine may be small
    planned = triplane("plan", "big/1b.toml", elsewhere, *cluster, cwd=tmp_path)
    assert planned.returncode == 0 and "no problems" in planned.stdout, planned.stdout + planned.stderr
    dry = triplane("train", "big/1b.toml", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0 and "of 8 (" in dry.stdout, dry.stderr
    text = (tmp_path / "big/1b.toml").read_text()
    assert tomllib.loads(text)["run_dir"] == "runs/1b"
    assert all(len(line.partition("  # ")[2]) > 5 for line in text.splitlines() if " = " in line)


def _config(train_tokens: int, size: str | None, gpus: int | None = None, vocab_size: int = 32_768) -> RunConfig:
    text = Text("corpus", vocab_size=vocab_size, train_tokens=train_tokens, validation_tokens=train_tokens // 50)
    cluster = Cluster(gpus, "h200", GPUS["h200"]) if gpus else None
    config = RunConfig.model_validate(values(choose(text, "run", size=size, start=None, cluster=cluster)))
    assert check(config, gpus or 1) == []
    return config


@pytest.mark.parametrize(("size", "vocab_size", "named"), SIZED)
def test_a_size_is_trained_by_the_rules(size: str, vocab_size: int, named: float) -> None:
    config = _config(10**13, size, vocab_size=vocab_size)
    parameters = count_parameters(config.model)
    assert parameters == pytest.approx(named, rel=0.1)
    assert config.training.steps * tokens_per_step(config) == pytest.approx(20 * parameters, rel=0.01)
    assert config.model.attention.head_dim * config.model.attention.n_heads == config.model.dim


def test_batch_and_learning_rate_are_those_of_deepseek_llm() -> None:
    config = _config(10**13, "1b")  # 1.1e9 parameters x 2.2e10 tokens x 6 = 1.5e20 FLOPs, and attention's
    assert config.optimizer.lr == pytest.approx(9.3e-4, rel=0.03)
    assert tokens_per_step(config) in (2**20, 2**21)
    assert config.schedule.warmup_steps == -(-config.training.steps // 20)


@pytest.mark.parametrize("gpus", [None, 1, 6, 8])
@pytest.mark.parametrize("tokens", [300, 10**4, 10**6, 10**8, 10**9])
def test_text_is_read_at_most_four_times(tokens: int, gpus: int | None) -> None:
    config = _config(tokens, None, gpus)
    read = config.training.steps * tokens_per_step(config)
    assert read <= 4 * tokens or config.training.steps == 1
    name = next(name for name, size in SIZES.items() if size.dim == config.model.dim)
    assert name == "1m" or 20 * count_parameters(config.model) <= 4 * tokens
    assert gpus or (name == "1m" and read <= 2_100_000)


def test_what_cannot_be_is_told(prepared: Prepared, tmp_path: Path) -> None:
    for options, message in (
        (("nowhere",), "nowhere/train/manifest.json: No such file or directory"),
        (("texts.tar",), "texts.tar: tars are not a corpus yet; write one with `triplane prepare`"),
        ((prepared.folder, "--gpus", 8), "--gpus and --gpu: give both, or neither for a run on CPUs"),
        ((prepared.folder, "--gpus", 8, "--gpu", "h999"), "h999"),
        (
            (prepared.folder, "--size", "8b", "--gpus", 1, "--gpu", "l40s"),
            "no layout of 8b fits 1 x l40s: give more --gpus or a smaller model",
        ),
    ):
        refused = triplane("init", *options, cwd=tmp_path)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_line_knows_the_sizes(tmp_path: Path) -> None:
    unknown = triplane("init", "corpus", "--size", "2b", cwd=tmp_path)
    assert f"is not one of {', '.join(map(repr, SIZES))}; see --help" in unknown.stderr


def test_a_run_goes_on_from_the_weights_of_a_checkpoint(prepared: Prepared, tmp_path: Path) -> None:
    config = small_config(vocab_size=prepared.tokenizer.vocab_size, qkv_bias=True)
    llama(config, random_weights(config)).save_pretrained(tmp_path / "hf")
    assert triplane("import", "hf", "start", cwd=tmp_path).returncode == 0
    written = triplane("init", prepared.folder, "--initial", "start", "--out", "more.toml", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    more = load_config(tmp_path / "more.toml")
    assert more.model == config and more.checkpoint.initial == "start"
    trained = triplane("train", "more.toml", "training.stop_at_step=1", "--device", "cpu", cwd=tmp_path)
    assert trained.returncode == 0 and "starting from start" in trained.stdout, trained.stdout + trained.stderr


def test_text_of_another_tokenizer_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = small_config()
    llama(config, random_weights(config)).save_pretrained(tmp_path / "hf")
    assert triplane("import", "hf", "start", cwd=tmp_path).returncode == 0
    for options, message in (
        ((), "has 400 token ids, but start 96; prepare the text with the tokenizer of the checkpoint\n"),
        (("--size", "1m"), "--size and --initial: give one; a checkpoint has a size of its own\n"),
    ):
        refused = triplane("init", prepared.folder, "--initial", "start", *options, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stderr.endswith(message), refused.stderr


def test_sequences_are_as_long_as_the_windows_of_a_checkpoint() -> None:
    model = small_config(n_layers=2, layers=[{"attention": {"window": 4096}}, {}])
    text = Text("corpus", vocab_size=96, train_tokens=10**8, validation_tokens=10**6)
    config = RunConfig.model_validate(values(choose(text, "run", size=None, start=Start("it", model), cluster=None)))
    assert check(config, 1) == []
    assert config.model == model and config.data.seq_len == 4096
