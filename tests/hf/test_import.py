"""Folders that transformers wrote become checkpoints to train on from, or nothing."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_families import CASES, their_model
from runs import small_run
from safetensors.torch import load_file, save_file
from small_corpora import Prepared
from small_models import llama, random_weights, small_config, with_gate_and_up_swapped
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork
from transformers import MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from triplane.checkpoint.parent import parent_in
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.weights import CheckpointWeights
from triplane.config.preflight import check_run_dir, run_record
from triplane.data.opening import open_sources
from triplane.hf.config import family_of, hf_config
from triplane.hf.families.table import FAMILIES
from triplane.hf.importing import import_hf
from triplane.launcher.cli import app
from triplane.launcher.run import train_on
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.storage.errors import CheckpointError, ModelError
from triplane.training.config import RunConfig


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}], ids=["untied", "tied", "biases"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_transformers_saved_is_imported(changes: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    config = small_config(**changes)
    weights = random_weights(config)
    llama(config, weights).to(dtype).save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    imported = import_hf(tmp_path / "hf", tmp_path / "out/start")
    assert imported.model == config
    difference = imported.report.transformers_difference
    assert difference is not None and difference < 1e-5 < imported.report.largest_logit
    found = CheckpointWeights(Checkpoint(tmp_path / "out/start"))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].equal(weight.to(dtype).float()), name
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["start"]
    with pytest.raises(CheckpointError, match="start exists; remove it"):
        import_hf(tmp_path / "hf", tmp_path / "out/start")


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    config = small_config()
    theirs = llama(config, random_weights(config))
    content = hf_config(config, 64, family_of(config), bos_id=None, eos_id=None, dtype="float32")
    mistral = MistralForCausalLM(MistralConfig(**content | {"model_type": "mistral", "sliding_window": None}))
    mistral.load_state_dict(theirs.state_dict())
    mistral.save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "mistral"
    assert import_hf(tmp_path / "hf", tmp_path / "start").model == config


def test_weights_read_otherwise_than_transformers_does_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    llama(config, random_weights(config)).save_pretrained(tmp_path / "hf")
    monkeypatch.setitem(FAMILIES, "llama", with_gate_and_up_swapped())
    with pytest.raises(CheckpointError, match=r"Read by transformers 5.* nothing was published"):
        import_hf(tmp_path / "hf", tmp_path / "out/start")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Llama that transformers has saved in one file."""
    config = small_config()
    llama(config, random_weights(config)).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def _edit(hf: Path, **changes: Any) -> None:
    """Replaces keys of config.json."""
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _store(hf: Path, file: Any = "model.safetensors", **weights: Any) -> None:
    """Adds, replaces or (None) removes weights; their names have `__` for dots."""
    tensors = load_file(hf / "model.safetensors")
    for name, weight in weights.items():
        tensors[name.replace("__", ".")] = weight
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, hf / file, {"format": "pt"})


def _shard(hf: Path, weight_map: Any) -> None:
    """Replaces the file by an index."""
    (hf / "model.safetensors").rename(hf / "model-1.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _deep(hf: Path) -> None:
    (hf / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def _fifo(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    os.mkfifo(hf / "model.safetensors")


def _bin_only(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")


def _twice(hf: Path) -> None:
    names = list(load_file(hf / "model.safetensors"))
    _shard(hf, dict.fromkeys(names, "model-1.safetensors") | {"x": "model-2.safetensors"})
    (hf / "model-2.safetensors").write_bytes((hf / "model-1.safetensors").read_bytes())


def _loop(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").symlink_to("model.safetensors")


NORM, UP = "model__layers__1__input_layernorm__weight", "model__layers__0__mlp__up_proj__weight"
ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (shutil.rmtree, r"hf/config.json: No such file.*; give a Hugging Face folder"),
    "no JSON": (lambda hf: (hf / "config.json").write_text("{"), r"config.json: not JSON"),
    "too deep": (_deep, r"config.json: not JSON: nested too deeply"),
    "a pipe for config": (lambda hf: (hf / "config.json").unlink() or os.mkfifo(hf / "config.json"), "not a regular"),
    "a pipe for weights": (_fifo, r"model.safetensors: not a regular file"),
    "a link to itself": (_loop, r"model.safetensors: Too many levels"),
    "short": (lambda hf: (hf / "model.safetensors").write_bytes(b"short"), r"model.safetensors: unreadable"),
    "bin only": (_bin_only, r"pytorch_model.bin is not read: save the model as safetensors"),
    "outside": (lambda hf: _shard(hf, {"lm_head.weight": "../x.safetensors"}), "not a plain file name"),
    "absolute": (lambda hf: _shard(hf, {"lm_head.weight": "/x.safetensors"}), "not a plain file name"),
    "map a list": (lambda hf: _shard(hf, []), r"index.json: weight_map is \[\]"),
    "rope of text": (lambda hf: _edit(hf, rope_scaling="linear"), "rope_scaling is 'linear': no table of keys$"),
    "index a list": (
        lambda hf: _shard(hf, {}) or (hf / "model.safetensors.index.json").write_text("[]"),
        r"index.json: no table of keys",
    ),
    "an index without metadata": (
        lambda hf: _shard(hf, {}) or (hf / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        r'index.json: no metadata, without which transformers reads no index; add "metadata": {}$',
    ),
    "empty index": (lambda hf: _shard(hf, {}), "has 2 layers, but 0 have weights"),
    "index lies": (lambda hf: _shard(hf, {"a": "model-1.safetensors"}), "lacks a, which .* says is there"),
    "in two files": (_twice, "is in model-1.safetensors and in model-2.safetensors"),
    "more layers": (lambda hf: _edit(hf, num_hidden_layers=3), "has 3 layers, but 2 have weights"),
    "endless layers": (lambda hf: _edit(hf, num_hidden_layers=10**4), "has 10000 layers, but"),
    "missing": (lambda hf: _store(hf, **{NORM: None}), r"1 weight is missing; the first is model.layers.1.input_l"),
    "no rest": (lambda hf: _store(hf, model__layers__5=torch.ones(1)), "first is model.layers.5$"),
    "a name of two lines": (lambda hf: _store(hf, **{"a\nb": torch.ones(1)}), "is 'a.nb': contains unprintable"),
    "unknown": (lambda hf: _store(hf, lm_head__bias=torch.ones(1)), "1 weight is in excess .* is lm_head.bias"),
    "shape": (
        lambda hf: _edit(hf, intermediate_size=96),
        r"up_proj.weight: its shape is \[80, 48\], .* makes it \[96, 48\]|down_proj|gate_proj",
    ),
    "0-d": (lambda hf: _store(hf, **{NORM: torch.tensor(1.0)}), r"input_layernorm.weight: its shape is \[\]"),
    "integers": (lambda hf: _store(hf, **{UP: torch.ones(80, 48, dtype=torch.int32)}), "its dtype is I32"),
    "nan": (lambda hf: _store(hf, **{UP: torch.full((80, 48), torch.nan)}), "up_proj.weight: 3840 of 3840 elements"),
    "beyond fp32": (
        lambda hf: _store(hf, **{UP: torch.full((80, 48), 1e300, dtype=torch.float64)}),
        "elements are not finite in fp32",
    ),
    "another head though tied": (
        lambda hf: _edit(hf, tie_word_embeddings=True),
        r"lm_head.weight: differs from model.embed_tokens.weight by",
    ),
    "output bias": (
        lambda hf: (
            _edit(hf, model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
            _store(
                hf,
                **{f"model__layers__{i}__self_attn__{x}_proj__bias": torch.ones(n)
                   for i in (0, 1) for x, n in (("q", 48), ("k", 16), ("v", 16), ("o", 48))},
            ),
        ),
        r"o_proj.bias: not zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), ODD.values(), ids=ODD.keys())
def test_an_odd_folder_is_refused_in_a_line_of_its_own_names(
    damage: Callable[[Path], object], expected: str, hf: Path, tmp_path: Path
) -> None:
    damage(hf)
    with pytest.raises((CheckpointError, ModelError), match=expected) as caught:
        import_hf(hf, tmp_path / "out/start")
    assert "\n" not in str(caught.value) and "blocks." not in str(caught.value)
    assert not (tmp_path / "out").exists()


FREQUENCIES = "model__layers__0__self_attn__rotary_emb__inv_freq"
FINE: dict[str, Callable[[Path], object]] = {
    "frequencies of old conversions": lambda hf: _store(hf, **{FREQUENCIES: torch.ones(4)}),
    "an equal head beside tied embeddings": lambda hf: (
        _store(hf, lm_head__weight=load_file(hf / "model.safetensors")["model.embed_tokens.weight"].clone()),
        _edit(hf, tie_word_embeddings=True),
    ),
    "one file beside an index": lambda hf: (hf / "model.safetensors.index.json").write_text("{}"),
    "a link, as in the hub's cache": lambda hf: (
        (hf / "model.safetensors").rename(hf.parent / "blob"),
        (hf / "model.safetensors").symlink_to("../blob"),
    ),
    "a window that Llama does not heed": lambda hf: _edit(hf, sliding_window=16),
}


@pytest.mark.parametrize("change", FINE.values(), ids=FINE.keys())
def test_what_transformers_loads_is_imported(change: Callable[[Path], object], hf: Path, tmp_path: Path) -> None:
    change(hf)
    report = import_hf(hf, tmp_path / "start").report
    assert report.transformers_difference is not None and report.transformers_difference < 1e-5


def test_a_window_that_only_transformers_heeds_is_noticed(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If our reading of a window were wrong, logits past it would tell."""
    _edit(hf, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=300)
    _edit(hf, max_position_embeddings=512)
    assert import_hf(hf, tmp_path / "right").model.attention.window == 300
    heedless = tuple(trait for trait in FAMILIES["mistral"].traits if "sliding_window" not in trait.keys)
    monkeypatch.setitem(FAMILIES, "mistral", replace(FAMILIES["mistral"], traits=heedless))
    with pytest.raises(CheckpointError, match=r"Read by transformers .* logits differ"):
        import_hf(hf, tmp_path / "start")


def test_a_full_disk_is_a_line_and_leaves_nothing(hf: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(150_000))
    with pytest.raises(CheckpointError, match="start: cannot be written: No space left on device; make room"):
        import_hf(hf, small_disk / "start")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


LAYOUTS = {"one": {"dp": 1, "zero": 0}, "zero1 dp2": {"dp": 2}, "tp2 pp2": {"dp": 1, "tp": 2, "pp": 2}}


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def test_a_run_begins_with_the_weights_in_every_layout_and_resumes_without_them(
    prepared: Prepared, tmp_path: Path
) -> None:
    shape = {"vocab_size": prepared.tokenizer.vocab_size, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "dim": 32}
    shape |= {"hidden_dim": 64, "n_layers": 2}
    model = small_config(**shape)
    weights = random_weights(model)
    llama(model, weights).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "start")
    curves = []
    for name, layout in LAYOUTS.items():
        changes = {
            "model": shape,
            "parallel": layout,
            "optimizer": {"eps": 1e-3},
        }
        rules = {"every_steps": 1, "keep_last": 9}
        run = tmp_path / name
        begin = {"checkpoint": rules | {"initial": str(tmp_path / "start")}, "training": {"stop_at_step": 2}}
        config = small_run(prepared, run, **changes, **begin)
        record = run_record(config, open_sources(config.data, config.folder.corpora))
        assert check_run_dir(config, record, allow_data_change=False, allow_fresh_start=False) == []
        ranks = config.parallel.ranks_of_one * layout["dp"]
        run_ranks(config.parallel, ranks, _train, config)
        whole = small_run(prepared, run, **changes, checkpoint=rules | {"initial": "gone"})
        run_ranks(config.parallel, ranks, _train, whole)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves.append([line["loss"] for line in lines if "loss" in line])
        first = Checkpoint(run / "checkpoints" / "step_1").tensor("weight/norm.weight")
        assert 0 < (first - weights["norm.weight"]).abs().max() < 0.02  # one step away
    assert len(curves[0]) == 8
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-5)


def test_a_parent_is_named_by_its_folder_and_not_by_the_way_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "below")
    assert parent_in(Path(".."), 64).name == "model"
    snapshot = tmp_path / "models--someone--theirs" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    monkeypatch.chdir(snapshot)
    assert parent_in(Path("."), 64).name == "someone/theirs"


def test_weights_of_another_network_are_refused_before_a_rank_starts(prepared: Prepared, tmp_path: Path) -> None:
    model = small_config()
    llama(model, random_weights(model)).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "start")
    for initial, expected in (("start", "start has dim 48, but model.dim is 32"), ("gone", "gone: neither a checkp")):
        config = small_run(prepared, tmp_path / "run", checkpoint={"initial": str(tmp_path / initial)})
        record = run_record(config, open_sources(config.data, config.folder.corpora))
        problems = check_run_dir(config, record, allow_data_change=False, allow_fresh_start=False)
        assert any(expected in problem for problem in problems)


def test_the_commands(tmp_path: Path) -> None:
    model = small_config()
    llama(model, random_weights(model)).save_pretrained(tmp_path / "hf")
    imported = CliRunner().invoke(app, ["import", str(tmp_path / "hf"), str(tmp_path / "start")])
    assert imported.exit_code == 0, imported.output
    assert "by transformers" in imported.output and "[model]\nvocab_size = 96\n" in imported.output
    shown = CliRunner().invoke(app, ["inspect", "--verify", str(tmp_path / "start")])
    assert shown.exit_code == 0, shown.output
    assert f"imported from {tmp_path / 'hf'}; loads into every layout" in shown.output
    evaluated = CliRunner().invoke(app, ["evaluate", str(tmp_path / "start")])
    assert "an imported model has no corpora of its own; give some by --corpus" in str(evaluated.exception)


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_an_imported_model_is_used_before_any_training_and_comes_back(
    family: str, prepared: Prepared, tmp_path: Path
) -> None:
    keys = CASES[f"{family} 0"][1] | {"vocab_size": prepared.tokenizer.vocab_size}
    theirs = their_model(family, keys)
    theirs.save_pretrained(tmp_path / "a")
    prepared.tokenizer.save(tmp_path / "a")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        return result.output

    run("import", tmp_path / "a", tmp_path / "b")
    assert run("generate", tmp_path / "b", "--prompt", "def", "--tokens", 3).startswith("def")
    told = run("evaluate", tmp_path / "b", "--corpus", prepared.folder, "--sequences", 2)
    assert "validation loss" in told and "unigram model" in told
    run("export", tmp_path / "b", tmp_path / "c", "--dtype", "fp32")
    assert json.loads((tmp_path / "c/config.json").read_text())["model_type"] == family
    tensors, back = (load_file(tmp_path / folder / "model.safetensors") for folder in "ac")
    assert tensors.keys() == back.keys()
    assert all(back[name].equal(tensor) for name, tensor in tensors.items())
