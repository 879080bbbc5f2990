"""Mistakes in the network's tables: each in one line that helps, all at once, before anything starts."""

from pathlib import Path

import pytest
from commands import triplane

from triplane.config.checks import check
from triplane.config.load import load_config
from triplane.storage.errors import ConfigError

GOOD = """\
run_dir = "runs/a"
[schedule]
warmup_steps = 1
[data]
sources = [{ corpus = "corpora/a" }]
seq_len = 16
[training]
steps = 10
global_batch_size = 8
micro_batch_size = 2
[model]
vocab_size = 100
dim = 32
n_layers = 4
attention = { n_heads = 4, n_kv_heads = 2, head_dim = 8 }
feed_forward = { hidden_dim = 64 }
"""

UNREADABLE = {
    'model.positions={kind="rotory"}': 'model.positions: kind is "rotory"; did you mean rotary?',
    'model.norm={kind="batch"}': 'model.norm: kind is "batch"; known here: rms, layer, scale, fix',
    "model.feed_forward.kind=gatted": 'model.feed_forward: kind is "gatted"; did you mean gated?',
    "model.attention.kind=hyena": 'model.attention: kind is "hyena"; known here: softmax, latent',
    'model.attention.qk_norm={kind="scail"}': 'model.attention.qk_norm: kind is "scail"; did you mean scale?',
    'model.layers=[{positions={kind="learnt"}}]': (
        'model.layers[0].positions: kind is "learnt"; did you mean learned?'
    ),
    "model.positions.scaling={factor=2.0}": (
        "model.positions.scaling: kind is missing; known here: linear, llama3, yarn"
    ),
    'model.positions={kind="learned", max_seq_len=16, base=3.0}': (
        'model.positions.base: not an option of positions of kind "learned", but of rotary and sinusoidal'
    ),
    'model.norm={kind="scale", unit_offset=true}': (
        'model.norm.unit_offset: not an option of norm of kind "scale", but of rms and layer'
    ),
    'model.feed_forward={kind="plain", hidden_dim=64, clamp=7.0}': (
        'model.feed_forward.clamp: not an option of feed_forward of kind "plain", but of gated and experts'
    ),
    'model.positions={scaling={kind="linear", factor=2.0, beta_fast=3.0}}': (
        'model.positions.scaling.beta_fast: not an option of scaling of kind "linear", but of yarn'
    ),
    "model.norm.epz=0.1": "model.norm.epz: unknown key; did you mean eps?",
    "model.attention.clamp=7.0": "model.attention.clamp: unknown key; did you mean model.feed_forward.clamp?",
    "model.n_heads=4": "model.n_heads: stands for attention.n_heads, which is given as well; leave one out",
    "model.layers=3": "model.layers: 3 given; should be a list of tables, [[model.layers]]",
    "model.layers=[{}, 3]": "model.layers[1]: 3 given; should be a table, [model.layers[1]]",
    "model.layers=[{attention=3}]": (
        "model.layers[0].attention: 3 given; should be a table, [model.layers[0].attention]"
    ),
    "model.layers=[{norm={}}]": "model.layers[0].norm: unknown key; did you mean model.norm?",
    "model.norm=layer": 'model.norm: "layer" given; should be a table, [model.norm]',
    'model.norm={kind="layer", gain=false}': "model.norm: bias = true requires gain = true; set bias = false",
    'model.positions={kind="relative", max_distance=16}': (
        "model.positions: max_distance (16) must be over half of buckets (32)"
    ),
}

CONTRADICTORY = {
    "model.layers=[{attention={window=4}}, {}, {}]": (
        "layers repeat every 3, which does not divide n_layers (4); the next multiple is 6"
    ),
    "model.layers=[{repeat=2, attention={window=17}}, {repeat=2}]": (
        "attention.window (17) is over seq_len (16); leave it out, or set it lower"
    ),
    'model.positions={kind="learned", max_seq_len=15}': "learned positions number 15 tokens, but seq_len is 16",
    'model.layers=[{positions={kind="learned", max_seq_len=16}}, {}]': (
        'layers: positions of kind "learned" serve the whole network; set model.positions'
    ),
    'model.layers=[{positions={kind="sinusoidal"}}, {}]': (
        'layers: positions of kind "sinusoidal" serve the whole network; set model.positions'
    ),
    "model.layers=[{attention={head_dim=16}}, {}]": "layers have a head_dim of 8 and 16; all must have the same",
    'model.positions={kind="alibi"} model.layers=[{attention={n_heads=8}}]': (
        "layers have 4 and 8 heads, but positions that differ by head"
    ),
    "model.positions.fraction=0.4": (
        "rotary positions turn pairs of dims, but head_dim (8) x fraction (0.4) is 3, not an even number"
    ),
    'model.layers=[{positions={kind="none"}}, {positions={fraction=0.1}}]': (
        "rotary positions turn pairs of dims, but head_dim (8) x fraction (0.1) is 0, not an even number"
    ),
    "model.residual=parallel model.norm_placement=post": (
        'residual "parallel" requires norm_placement "pre", not "post"'
    ),
    'model.dim=33 model.positions={kind="sinusoidal"}': (
        "sinusoidal positions are pairs of sine and cosine, but dim (33) is odd"
    ),
    'model.attention.qk_norm={kind="rms"} model.attention.qk_norm_over=all parallel.tp=4': (
        'qk_norm_over "all" needs the weights of whole key heads on each rank, but n_kv_heads (2) is not a multiple of '
        "tp (4)"
    ),
}


@pytest.fixture(name="file")
def good_file(tmp_path: Path) -> Path:
    file = tmp_path / "a.toml"
    file.write_text(GOOD)
    return file


def test_the_network_without_mistakes_is_accepted(file: Path) -> None:
    assert check(load_config(file), 4) == []


@pytest.mark.parametrize("override", UNREADABLE)
def test_a_table_that_cannot_be_read(file: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert str(caught.value) == f"override: {UNREADABLE[override]}"


@pytest.mark.parametrize("overrides", CONTRADICTORY)
def test_keys_that_contradict_each_other(file: Path, overrides: str) -> None:
    assert check(
        load_config(file, overrides.replace(" model.", "\nmodel.").replace(" par", "\npar").split("\n")), 4
    ) == [CONTRADICTORY[overrides]]


def test_a_short_key_and_its_table_are_placed_in_the_file(file: Path) -> None:
    file.write_text(GOOD.replace("dim = 32\n", 'dim = "32"\nnorm_eps = 1e-6\nnorm = { eps = 1e-5, gian = true }\n'))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).splitlines() == [
        f'{file}: model.dim: "32" given; should be a valid integer',
        f"{file}: model.norm.gian: unknown key; known here: kind, eps, unit_offset",
        f"{file}: model.norm_eps: stands for norm.eps, which is given as well; leave one out",
    ]


def test_a_short_key_of_another_kind_is_named_as_it_was_given(file: Path) -> None:
    file.write_text(GOOD + 'rope_base = 3.0\npositions = { kind = "alibi" }\n')
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    expected = 'model.rope_base: not an option of positions of kind "alibi", but of rotary and sinusoidal'
    assert str(caught.value) == f"{file}: {expected}"


def test_the_command_tells_all_at_once_and_exits_with_2(file: Path) -> None:
    unreadable = ['model.positions={kind="rotory"}', "model.norm.epz=0.1", "model.layers=3"]
    result = triplane("train", "a.toml", *unreadable, cwd=file.parent)
    assert result.returncode == 2
    found = [line.removeprefix("triplane: ") for line in result.stderr.splitlines()]
    assert sorted(found) == sorted(f"override: {UNREADABLE[override]}" for override in unreadable)
    contradictory = ["model.positions.fraction=0.4", "model.layers=[{attention={window=17}}, {}, {}]"]
    result = triplane("train", "a.toml", *contradictory, cwd=file.parent)
    assert result.returncode == 2
    for line in (
        CONTRADICTORY["model.positions.fraction=0.4"],
        "layers repeat every 3",
        "attention.window (17) is over",
    ):
        assert line in result.stderr
