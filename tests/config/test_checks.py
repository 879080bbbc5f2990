"""Checks across keys: every one is triggered, with its operands in the message."""

from typing import Any

import pytest

from triplane.config.checks import check
from triplane.training.config import RunConfig
from triplane.training.optimizers.adamw import AdamW


def config(**changes: Any) -> RunConfig:
    """A config that passes with 4 ranks, with keys changed in whichever table has them."""
    shape = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 64}
    tables: dict[str, Any] = {
        "model": {"vocab_size": 96, **shape},
        "data": {"sources": [{"corpus": "c"}], "seq_len": 16},
        "parallel": {"tp": 2},
        "schedule": {"warmup_steps": 2},
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for key, value in changes.items():
        (table,) = (name for name in tables if key in _keys(RunConfig.model_fields[name].annotation))
        tables[table][key] = value
    return RunConfig.model_validate({"run_dir": "r", **tables})


def _keys(table: Any) -> list[str]:
    return [*table.model_fields, *getattr(table, "short_keys", ())]


def test_a_good_config_passes_with_and_without_ranks() -> None:
    assert check(config(), 4) == check(config(), None) == []


@pytest.mark.parametrize(
    ("changes", "ranks", "problem"),
    [
        ({"dp": 3, "pp": 2, "global_batch_size": 12}, 8, "dp (3) x tp (2) x pp (2) = 12, but 8 ranks"),
        ({"pp": 2}, 6, "tp (2) x pp (2) = 4 does not divide 6 ranks"),
        ({"tp": 1, "cp": 4}, 2, "tp (1) x pp (1) x cp (4) = 4 does not divide 2 ranks"),
        (
            {"n_heads": 6, "tp": 4, "n_kv_heads": 3},
            4,
            "n_heads (6) is not a multiple of tp (4); the next multiple is 8\n"
            "n_kv_heads (3) and tp (4): one must be a multiple of the other",
        ),
        ({"hidden_dim": 63}, 4, "hidden_dim (63) is not a multiple of tp (2); the next multiple is 64"),
        (
            {"sequence_parallel": True, "tp": 1},
            2,
            "sequence_parallel requires tp > 1: it splits tokens over the tp ranks",
        ),
        (
            {"cp": 4},
            8,
            'cp_method "ulysses" gives each of cp (4) ranks a share of n_heads / tp (2) heads, which is not a whole '
            'number; use "ring"',
        ),
        (
            {"cp": 8, "cp_method": "ring", "seq_len": 20},
            16,
            "micro_batch_size (2) x seq_len (20) (40) is not a multiple of 2 x cp (8) = 16; the next multiple is 48",
        ),
        (
            {"n_layers": 1, "pp": 4, "global_batch_size": 16},
            8,
            "pp (4) x virtual_stages (1) = 4 stages need at least 3 layers, but n_layers is 1",
        ),
        ({"virtual_stages": 2}, 2, "virtual_stages (2) requires pp > 1"),
        (
            {"pp": 2, "virtual_stages": 2, "global_batch_size": 2},
            4,
            "virtual_stages needs at least pp (2) micro-batches, but global_batch_size (2) / "
            "(dp (1) x micro_batch_size (2) = 2) is 1",
        ),
        (
            {"zero": 0, "offload_optimizer": True},
            2,
            "offload_optimizer requires zero > 0: replicated state stays on the GPU",
        ),
        ({"dp_shard": 2, "zero": 0}, 4, "dp_shard (2) requires zero > 0: stage 0 shares nothing"),
        (
            {"dp_shard": 3, "tp": 1},
            4,
            "dp (4) x cp (1) = (4) is not a multiple of dp_shard (3); the next multiple is 6",
        ),
        (
            {"recompute": "selective"},
            2,
            'recompute "selective" with tp requires sequence_parallel: the all-reduce of tp overwrites the products '
            "that would be kept",
        ),
        (
            {"fp8": True, "precision": "fp32"},
            2,
            "fp8 requires precision bf16: fp32 weights would gain nothing\n"
            "fp8: n_kv_heads x head_dim (16) is not a multiple of 16 x tp (2), which its kernels require; the next "
            "multiple is 32",
        ),
        ({"n_kv_heads": 3, "tp": 1}, 4, "n_heads (4) is not a multiple of n_kv_heads (3); the next multiple is 6"),
        (
            {"head_dim": 7},
            4,
            "rotary positions turn pairs of dims, but head_dim (7) x fraction (1) is 7, not an even number",
        ),
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
        (
            {"batch_ramp": [{"after_steps": 4, "global_batch_size": 10}, {"after_steps": 4, "global_batch_size": 16}]},
            4,
            "batch_ramp[1]: after_steps (4) is not after 4, where the previous size starts\n"
            "batch_ramp[0].global_batch_size (10) is not a multiple of dp (2) x micro_batch_size (2) = 4; the next "
            "multiple is 12",
        ),
        (
            {
                "batch_ramp": [{"after_steps": 4, "global_batch_size": 16}],
                "phases": [{"from_sequence": 40, "weights": [1], "seq_len": 32}],
            },
            4,
            "data.phases[0]: seq_len changes at from_sequence (40), within step 5; the next begins at 48",
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
        ({"stop_at_step": 11}, 4, "stop_at_step (11) is after the last of 10 steps"),
    ],
)
def test_each_check_names_its_operands(changes: dict[str, Any], ranks: int, problem: str) -> None:
    assert check(config(**changes), ranks) == problem.splitlines()


def test_an_average_is_not_kept_by_deepspeed() -> None:
    averaged = {"optimizer": AdamW(average_decay=0.9)}
    assert check(config(offload_optimizer=True, zero=2).model_copy(update=averaged), 4) == [
        "average_decay (0.9) with offload_optimizer requires zero = 3, not 2: DeepSpeed keeps no average"
    ]
    assert check(config(offload_optimizer=True, zero=3).model_copy(update=averaged), 4) == []


def test_zero_3_goes_with_dp_shard() -> None:
    assert check(config(dp_shard=2, zero=3), 4) == []


def test_all_problems_come_together() -> None:
    assert len(check(config(head_dim=7, stop_at_step=99, hidden_dim=63, pp=2, zero=0, offload_optimizer=True), 3)) == 5


def test_a_phase_keeps_the_weights_and_length_that_it_does_not_give() -> None:
    sources = [{"corpus": "a", "weight": 3.0}, {"corpus": "b"}]
    phases = [{"from_sequence": 8, "seq_len": 32}, {"from_sequence": 16, "weights": [1, 9]}]
    data = config(sources=sources, phases=phases).data
    assert data.timeline() == [(0, [3, 1], 16), (8, [3, 1], 32), (16, [1, 9], 32)]
