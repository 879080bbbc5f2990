"""Folders that transformers wrote become checkpoints to train on from, or nothing."""

import json
from pathlib import Path

import pytest
import torch
from runs import small_run
from small_corpora import Prepared
from small_models import llama, random_weights, small_config
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork
from transformers import MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from triplane.checkpoint import hf_weights
from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.import_hf import import_hf
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.weights import CheckpointWeights
from triplane.data.opening import open_sources
from triplane.launcher.cli import app
from triplane.launcher.config import RunConfig
from triplane.launcher.forked import run_ranks
from triplane.launcher.preflight import check_run_dir, run_record
from triplane.launcher.run import train_on
from triplane.model.errors import ModelError
from triplane.model.hf import hf_config
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.mesh import Mesh


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
    assert imported.report.transformers_difference < 1e-5 < imported.report.largest_logit
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
    content = hf_config(config, 64, None, None, torch.float32)
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
    swap = {"mlp.gate_proj": "mlp.up_proj", "mlp.up_proj": "mlp.gate_proj"}
    from_hf = hf_weights.from_hf_name
    monkeypatch.setattr(
        hf_weights,
        "from_hf_name",
        lambda name: from_hf(next((name.replace(a, b) for a, b in swap.items() if a in name), name)),
    )
    with pytest.raises(CheckpointError, match=r"Read by transformers 5.* nothing was published"):
        import_hf(tmp_path / "hf", tmp_path / "out/start")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_is_no_llama_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: .* give a Hugging Face folder"):
        import_hf(tmp_path, tmp_path / "out")
    config = small_config()
    hf = tmp_path / "hf"
    llama(config, random_weights(config)).save_pretrained(hf)
    content = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"9 names differ from the model's; the first, blocks.2"):
        import_hf(hf, tmp_path / "out")
    (hf / "config.json").write_text(json.dumps(content))
    (hf / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"no readable model.safetensors.index.json or model.safetensors"):
        import_hf(hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


LAYOUTS = {"one": {"dp": 1, "zero": 0}, "zero1 dp2": {"dp": 2}, "tp2 pp2": {"dp": 1, "tp": 2, "pp": 2}}


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def test_a_run_begins_with_the_weights_in_every_layout_and_resumes_without_them(
    prepared: Prepared, tmp_path: Path
) -> None:
    shape = {"vocab_size": prepared.tokenizer.vocab_size, "n_heads": 4, "dim": 32, "hidden_dim": 64}
    model = small_config(**shape)
    weights = random_weights(model)
    llama(model, weights).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "start")
    curves = []
    for name, layout in LAYOUTS.items():
        changes = {
            "model": model.model_dump(),
            "parallel": layout,
            "optimizer": {"eps": 1e-3},
        }
        rules = {"every_steps": 1, "keep_last": 9}
        run = tmp_path / name
        begin = {"checkpoint": rules | {"initial": str(tmp_path / "start")}, "training": {"stop_at_step": 2}}
        config = small_run(prepared, run, **changes, **begin)
        record = run_record(config, open_sources(config.data, run))
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


def test_weights_of_another_network_are_refused_before_a_rank_starts(prepared: Prepared, tmp_path: Path) -> None:
    model = small_config()
    llama(model, random_weights(model)).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "start")
    for initial, expected in (("start", "start has dim 48, but model.dim is 32"), ("gone", "gone: neither a checkp")):
        config = small_run(prepared, tmp_path / "run", checkpoint={"initial": str(tmp_path / initial)})
        record = run_record(config, open_sources(config.data, tmp_path / "run"))
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
    assert "without a run; train with checkpoint.initial" in str(evaluated.exception)
