"""Retention deletes the right checkpoints, whatever the checkpoints and rules."""

from hypothesis import given
from hypothesis import strategies as st

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.retention import Kept, expendable

RULES = st.builds(
    CheckpointConfig,
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 7),
    keep_best=st.integers(0, 4),
)
LOSSES = st.none() | st.floats(0, 9) | st.just(float("nan"))
KEPT = st.dictionaries(st.integers(1, 60), LOSSES, max_size=20).map(lambda d: [Kept(*item) for item in d.items()])


@given(KEPT, RULES)
def test_what_a_rule_names_stays_and_the_rest_goes(kept: list[Kept], rules: CheckpointConfig) -> None:
    gone = expendable(kept, rules)
    steps = sorted(step for step, _ in kept)
    measured = {step: loss for step, loss in kept if loss is not None and loss == loss}
    assert gone == sorted(set(gone)) and set(gone) <= set(steps)
    assert not set(gone) & set(steps[-rules.keep_last :])
    for step in steps:
        newer = len([other for other in steps if other > step])
        better = [other for other in measured if step in measured and measured[other] < measured[step]]
        equal_later = [
            other for other in measured if step in measured and measured[other] == measured[step] and other > step
        ]
        named = (
            newer < rules.keep_last
            or (rules.keep_every is not None and step % rules.keep_every == 0)
            or (step in measured and len(better) + len(equal_later) < rules.keep_best)
        )
        assert (step in gone) != named


@given(KEPT, RULES)
def test_deleting_twice_deletes_no_more(kept: list[Kept], rules: CheckpointConfig) -> None:
    gone = expendable(kept, rules)
    assert expendable([checkpoint for checkpoint in kept if checkpoint.step not in gone], rules) == []
