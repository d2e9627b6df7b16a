"""Invariants of the per-token weights of the loss."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.aggregation import LossAggMode, token_weights

LENGTHS = [1, 3, 4]
lengths = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def loss(rows: list[np.ndarray], weights: list[np.ndarray]) -> float:
    return sum(float(row @ w) for row, w in zip(rows, weights, strict=True))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [1 / 8, 1 / 8, 1 / 8]),
        ("token-sum", [1, 1, 1]),
        ("seq-mean-token-sum", [1 / 3, 1 / 3, 1 / 3]),
        ("seq-mean-token-mean", [1 / 3, 1 / 9, 1 / 12]),
        ("seq-mean-token-sum-norm", [1 / 30, 1 / 30, 1 / 30]),
    ],
)
def test_weights_match_numbers_made_by_hand(mode: str, expected: list[float]) -> None:
    weights = token_weights(LENGTHS, mode, loss_scale_factor=10)
    assert [w.shape for w in weights] == [(1,), (3,), (4,)] and all(w.dtype == np.float32 for w in weights)
    for found, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-6)


@given(lengths, st.integers(0, 2**32 - 1))
def test_the_weighted_sum_is_the_padded_definition(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    padded = rng.normal(size=(len(sizes), max(sizes)))
    mask = np.arange(max(sizes)) < np.array(sizes)[:, None]
    summed = (padded * mask).sum(1)
    expected = {
        LossAggMode.TOKEN_MEAN: summed.sum() / mask.sum(),
        LossAggMode.TOKEN_SUM: summed.sum(),
        LossAggMode.SEQ_MEAN_TOKEN_SUM: summed.mean(),
        LossAggMode.SEQ_MEAN_TOKEN_MEAN: (summed / mask.sum(1)).mean(),
        LossAggMode.SEQ_MEAN_TOKEN_SUM_NORM: summed.mean() / 7,
    }
    rows = [padded[i, :size] for i, size in enumerate(sizes)]
    for mode in LossAggMode:
        assert loss(rows, token_weights(sizes, mode, 7)) == pytest.approx(expected[mode], rel=1e-5, abs=1e-5)


@given(lengths, st.data())
def test_cutting_the_list_anywhere_gives_the_same_loss(sizes: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sizes)), max_size=4)))
    rows = [np.linspace(-1, 1, size) for size in sizes]
    for mode in LossAggMode:
        weights = token_weights(sizes, mode, 7)
        edges = [0, *cuts, len(sizes)]
        parts = [loss(rows[a:b], weights[a:b]) for a, b in itertools.pairwise(edges)]
        assert sum(parts) == pytest.approx(loss(rows, weights), abs=1e-6)


@given(lengths)
def test_the_means_weigh_one_in_total(sizes: list[int]) -> None:
    for mode in (LossAggMode.TOKEN_MEAN, LossAggMode.SEQ_MEAN_TOKEN_MEAN):
        assert sum(float(w.sum()) for w in token_weights(sizes, mode)) == pytest.approx(1.0, abs=1e-5)


def test_no_answers_give_no_weights() -> None:
    for mode in LossAggMode:
        assert token_weights([], mode, 7) == []


def test_token_mean_is_the_default() -> None:
    assert np.array_equal(token_weights([2])[0], np.full(2, 0.5, np.float32))


@pytest.mark.parametrize("factor", [None, 0, -1.0, float("nan")])
def test_the_normed_mode_needs_its_constant(factor: float | None) -> None:
    with pytest.raises(ValueError, match=r"loss_scale_factor=.*max_response_length"):
        token_weights(LENGTHS, "seq-mean-token-sum-norm", factor)


def test_an_unknown_mode_is_an_error_listing_the_known_ones() -> None:
    with pytest.raises(ValueError, match="loss_agg_mode=mean is unknown: use one of token-mean"):
        token_weights(LENGTHS, "mean")


def test_an_answer_without_tokens_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match=r"\[0\]"):
        token_weights([3, 0])
