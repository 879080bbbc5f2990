"""Checks across keys: every one is triggered, with its operands in the message."""

import pytest

from triplane.launcher.checks import check, grad_accum_steps, resolve_dp
from triplane.launcher.config import RunConfig


def config(**changes) -> RunConfig:
    """A config that passes with 4 ranks, with keys changed in whichever table has them."""
    shape = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 64}
    tables = {
        "model": {"vocab_size": 96, **shape},
        "data": {"sources": [{"corpus": "c"}], "seq_len": 16},
        "parallel": {"tp": 2},
        "schedule": {"warmup_steps": 2},
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for key, value in changes.items():
        (table,) = (name for name in tables if key in RunConfig.model_fields[name].annotation.model_fields)
        tables[table][key] = value
    return RunConfig.model_validate({"run_dir": "r", **tables})


def test_a_good_config_passes_with_and_without_ranks():
    assert check(config(), 4) == check(config(), None) == []


@pytest.mark.parametrize(
    ("changes", "ranks", "problem"),
    [
        ({"dp": 3, "pp": 2, "global_batch_size": 12}, 8, "dp (3) x tp (2) x pp (2) = 12, but 8 ranks"),
        ({"pp": 2}, 6, "tp (2) x pp (2) = 4 does not divide 6 ranks"),
        ({"pp": 2}, 2, "tp (2) x pp (2) = 4 does not divide 2 ranks"),
        (
            {"n_heads": 6, "tp": 4, "n_kv_heads": 2},
            4,
            "n_heads (6) is not a multiple of tp (4); the next multiple is 8\n"
            "n_kv_heads (2) is not a multiple of tp (4); the next multiple is 4",
        ),
        ({"hidden_dim": 63}, 4, "hidden_dim (63) is not a multiple of tp (2); the next multiple is 64"),
        ({"vocab_size": 97, "tp": 2}, 4, "vocab_size (97) is not a multiple of tp (2); the next multiple is 98"),
        ({"n_layers": 1, "pp": 2}, 4, "n_layers (1) is less than pp (2): a stage would have no layer"),
        ({"n_kv_heads": 3, "tp": 1}, 4, "n_heads (4) is not a multiple of n_kv_heads (3); the next multiple is 6"),
        ({"head_dim": 7}, 4, "head_dim (7) is odd, but RoPE turns pairs; take 8"),
        (
            {"global_batch_size": 10},
            4,
            "global_batch_size (10) is not a multiple of dp (2) x micro_batch_size (2) = 4; the next multiple is 12",
        ),
        (
            {"global_batch_size": 9},
            None,
            "global_batch_size (9) is not a multiple of micro_batch_size (2); the next multiple is 10",
        ),
        ({"warmup_steps": None}, 4, "schedule: give one of warmup_steps and warmup_tokens, neither is given"),
        ({"warmup_tokens": 9}, 4, "schedule: give one of warmup_steps and warmup_tokens, both are given"),
        ({"warmup_steps": 11}, 4, "warm-up (11 steps) is longer than the run (10 steps)"),
        # 8 sequences x 16 tokens a step.
        (
            {"warmup_steps": None, "warmup_tokens": 1281},
            4,
            "warm-up (11 steps) is longer than the run (10 steps)",
        ),
        (
            {"kind": "wsd", "warmup_steps": 6, "decay_fraction": 0.5},
            4,
            "warm-up (6 steps) + wsd decay (5 steps) = 11, but 10 steps",
        ),
        ({"precision": "bf16", "zero": 0}, 4, "precision bf16 needs zero = 1: ZeRO keeps the fp32 master weights"),
        ({"stop_at_step": 11}, 4, "stop_at_step (11) is after the last of 10 steps"),
    ],
)
def test_each_check_names_its_operands(changes, ranks, problem):
    assert check(config(**changes), ranks) == problem.splitlines()


def test_all_problems_come_together():
    assert len(check(config(head_dim=7, stop_at_step=99, n_layers=1, pp=2, vocab_size=1), 3)) == 5


def test_auto_takes_the_ranks_that_are_left():
    assert resolve_dp(config(), 4) == 2
    assert resolve_dp(config(dp=3), 6) == 3
    assert grad_accum_steps(config(), dp=2) == 2
