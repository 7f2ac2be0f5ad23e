"""The cubic schedule: agreement with walking through training, exact ends, all problems at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pruning as reference

from hf_slim.core.errors import PlanError
from hf_slim.pruning.schedule import cubic_sparsity, plan_schedule


def schedule(total=100, initial=0.0, final=0.8, begin=10, end=50, every=7):
    return plan_schedule(total, initial=initial, final=final, begin=begin, end=end, every=every)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_schedule_matches_a_walk_through_training(data):
    end = data.draw(st.integers(1, 60))
    options = {
        "initial": data.draw(st.floats(0, 0.5)),
        "final": data.draw(st.floats(0.5, 0.99)),
        "begin": data.draw(st.integers(0, end - 1)),
        "end": end,
        "every": data.draw(st.integers(1, 20)),
    }
    made = plan_schedule(60, **options)
    for step in range(61):
        assert made.sparsity(step) == pytest.approx(reference.sparsity_by_hand(step, **options), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.floats(0, 0.7))
def test_sparsity_never_falls_and_changes_only_at_updates(every, initial):
    made = schedule(every=every, initial=initial)
    for step in range(100):
        assert made.sparsity(step + 1) >= made.sparsity(step)
        if not made.is_update(step + 1):
            assert made.sparsity(step + 1) == made.sparsity(step)


def test_ends_are_exact():
    made = schedule(initial=0.3, final=0.7)
    assert [made.sparsity(step) for step in (0, 9, 10, 50, 51, 100)] == [0.0, 0.0, pytest.approx(0.3), 0.7, 0.7, 0.7]
    assert made.sparsity(49) < 0.7
    assert made.is_update(10)
    assert made.is_update(50)
    assert not made.is_update(51)


def test_halfway_is_seven_eighths_of_the_way():
    assert cubic_sparsity(0.5, 0.0, 0.8) == pytest.approx(0.7)


def test_a_linear_schedule_grows_evenly():
    made = plan_schedule(100, initial=0.2, final=0.6, begin=10, end=50, every=10, curve="linear")
    found = [made.sparsity(step) for step in (9, 10, 19, 20, 30, 40, 50, 99)]
    assert found == pytest.approx([0.0, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6])
    assert made.updates() == [10, 20, 30, 40, 50]


def test_one_shot_drops_everything_at_the_first_update():
    made = plan_schedule(100, initial=0.0, final=0.6, begin=10, end=50, every=7, curve="one_shot")
    assert [made.sparsity(step) for step in (0, 9, 10, 11, 100)] == [0.0, 0.0, 0.6, 0.6, 0.6]


def test_updates_are_where_the_masks_change():
    made = schedule(every=7)
    assert made.updates() == [step for step in range(101) if made.is_update(step)]


def test_shares_of_training_and_steps_agree():
    assert schedule(200, begin=0.1, end=0.75, every=0.05) == schedule(200, begin=20, end=150, every=10)
    assert schedule(10, begin=0.0, end=1.0, every=0.001).every == 1
    assert schedule(200, begin=0, end=1).end == 1
    assert schedule(200, begin=0, end=1.0).end == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 101}, "step 101, but training has only 100"),
        ({"begin": 50, "end": 50}, "before its end, got begin=50 and end=50"),
        ({"begin": 0.9, "end": 0.2}, "before its end"),
        ({"begin": -1}, "step 0 or later"),
        ({"final": 1.0}, "sparsity is a share of weights"),
        ({"initial": -0.1}, "initial_sparsity is a share of weights"),
        ({"initial": 0.9}, "above the final sparsity"),
        ({"every": 0}, "at least 1, got 0"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        schedule(**options)


def test_all_problems_are_reported_at_once():
    with pytest.raises(PlanError) as caught:
        schedule(final=1.5, begin=300, end=200, every=0)
    assert len(caught.value.problems) == 4
