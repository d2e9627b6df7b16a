"""Invariants of the advantage estimators."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.advantage import advantage_metrics, estimate_groups, get_estimator, grpo_advantage
from verl.protocol import Score

FAILED = Score.failed("timeout: 1 s")


def scores(*totals: float | None) -> list[Score]:
    return [FAILED if t is None else Score.ok(t) for t in totals]


def test_grpo_matches_numbers_made_by_hand() -> None:
    # mean 0.5, squared deviations 4 x 0.25, ddof 1: std = sqrt(1/3)
    advantages = grpo_advantage(scores(1, 0, 0, 1))
    expected = 0.5 / (np.sqrt(1 / 3) + 1e-6)
    np.testing.assert_allclose(advantages.values, [expected, -expected, -expected, expected], rtol=1e-6)
    assert advantages.values.dtype == np.float32 and advantages.keep.all()


def test_without_std_the_advantage_is_the_distance_to_the_mean() -> None:
    np.testing.assert_allclose(grpo_advantage(scores(1, 0, 0.5), norm_by_std=False).values, [0.5, -0.5, 0], atol=1e-7)


@pytest.mark.parametrize("n", [2, 3, 5, 7, 8])
@pytest.mark.parametrize("total", [0.0, 0.1, 0.9, 1.0, -3.3])
def test_equal_scores_give_exactly_zero(total: float, n: int) -> None:
    advantages = grpo_advantage(scores(*[total] * n))
    assert np.array_equal(advantages.values, np.zeros(n)) and advantages.keep.all()


def test_scores_equal_up_to_rounding_give_exactly_zero() -> None:
    assert not np.any(grpo_advantage(scores(0.9, float(np.float32(0.9)), 0.3 * 3)).values)


@pytest.mark.parametrize("group", [scores(1.0), scores(None, 1.0, None), scores(None, None), []])
def test_a_group_with_fewer_than_two_scores_leaves_the_step(group: list[Score]) -> None:
    advantages = grpo_advantage(group)
    assert advantages.dropped and not advantages.values.any() and len(advantages.values) == len(group)


def test_a_failed_score_changes_no_statistics() -> None:
    with_failures = grpo_advantage(scores(1, None, 0, 0, None))
    assert with_failures.keep.tolist() == [True, False, True, True, False]
    assert np.array_equal(with_failures.values[with_failures.keep], grpo_advantage(scores(1, 0, 0)).values)
    assert not with_failures.values[~with_failures.keep].any()


# Multiples of 0.05 in [-2, 2]: what rules give, and far from the threshold of "equal".
groups = st.lists(st.one_of(st.none(), st.integers(-40, 40).map(lambda k: k / 20)), max_size=12)


@given(groups)
def test_kept_are_the_ok_scores_of_a_group_of_two_or_more(totals: list[float | None]) -> None:
    ok = [t is not None for t in totals]
    assert grpo_advantage(scores(*totals)).keep.tolist() == (ok if sum(ok) >= 2 else [False] * len(ok))


@given(groups)
def test_advantages_sum_to_zero_with_unit_spread(totals: list[float | None]) -> None:
    advantages = grpo_advantage(scores(*totals))
    kept = advantages.values[advantages.keep].astype(np.float64)
    assert abs(kept.sum()) < 1e-5
    if kept.any():
        assert kept.std(ddof=1) == pytest.approx(1.0, abs=1e-4)


@given(groups, st.randoms())
def test_the_order_of_the_answers_does_not_matter(totals: list[float | None], random: object) -> None:
    order = list(range(len(totals)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = grpo_advantage(scores(*[totals[i] for i in order]))
    np.testing.assert_allclose(shuffled.values, grpo_advantage(scores(*totals)).values[order], atol=1e-5)


@given(st.lists(st.integers(-40, 40).map(lambda k: k / 20), min_size=2, max_size=8), st.sampled_from([-3.0, 0.5, 10.0]))
def test_a_constant_added_to_all_rewards_changes_nothing(totals: list[float], shift: float) -> None:
    moved = grpo_advantage(scores(*[t + shift for t in totals]))
    np.testing.assert_allclose(moved.values, grpo_advantage(scores(*totals)).values, atol=1e-4)


def test_metrics_count_dropped_and_equal_groups() -> None:
    batch = [scores(1, 0), scores(0.9, 0.9), scores(1, None), scores(0, 0, None)]
    assert advantage_metrics(batch, [grpo_advantage(g) for g in batch]) == {
        "training/groups/count": 4,
        "training/groups/dropped": 1,
        "training/groups/failed_answers": 2,
        "training/groups/equal_share": pytest.approx(2 / 3),
        "training/groups/mixed_share": pytest.approx(1 / 3),
    }


def test_a_step_without_kept_groups_has_no_shares() -> None:
    metrics = advantage_metrics([scores(1)], [grpo_advantage(scores(1))])
    assert metrics["training/groups/dropped"] == 1 and "training/groups/equal_share" not in metrics


def test_estimators_are_found_by_name() -> None:
    assert get_estimator("grpo") is grpo_advantage


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gae", "critic.*use algorithm.adv_estimator=grpo"),
        ("remax", "not built yet"),
        ("gppo", "unknown.*did you mean grpo"),
    ],
)
def test_an_estimator_that_is_not_there_is_an_error_with_a_way_out(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        get_estimator(name)


def test_rloo_is_the_distance_to_the_mean_of_the_others() -> None:
    (found,) = estimate_groups("rloo", [scores(1, 0, 0.5, None)], [[1, 1, 1, 1]])
    np.testing.assert_allclose(found.values, [1 - 0.25, 0 - 0.75, 0.5 - 0.5, 0], atol=1e-7)
    assert found.keep.tolist() == [True, True, True, False]
    assert estimate_groups("rloo", [scores(1, None)], [[1, 1]])[0].dropped


def test_reinforce_plus_plus_whitens_over_the_tokens_of_the_step() -> None:
    # totals 1 (2 tokens), 0 (6 tokens): mean 0.25, variance 0.25 * 0.75
    found = estimate_groups("reinforce_plus_plus", [scores(1, None), scores(0)], [[2, 9], [6]])
    spread = np.sqrt(0.25 * 0.75)
    np.testing.assert_allclose(found[0].values, [0.75 / spread, 0], rtol=1e-6)
    np.testing.assert_allclose(found[1].values, [-0.25 / spread], rtol=1e-6)
    assert found[0].keep.tolist() == [True, False] and found[1].keep.tolist() == [True]


def test_reinforce_plus_plus_of_equal_rewards_is_zero() -> None:
    found = estimate_groups("reinforce_plus_plus", [scores(0.9, 0.9), scores(0.3 * 3)], [[3, 4], [5]])
    assert not any(a.values.any() for a in found) and all(a.keep.all() for a in found)


def test_grpo_of_the_step_is_grpo_of_each_group() -> None:
    groups = [scores(1, 0, 0), scores(0, 1)]
    found = estimate_groups("grpo", groups, [[1, 1, 1], [1, 1]], norm_by_std=False)
    for one, group in zip(found, groups, strict=True):
        np.testing.assert_array_equal(one.values, grpo_advantage(group, norm_by_std=False).values)
