"""Invariants of sampling: noise that depends on its name alone, and draws that follow the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import TopKLogitsWarper, TopPLogitsWarper

from verl.workers.rollout.base import sampling_noise
from verl.workers.rollout.hf import filter_logits, inverse_cdf


def test_the_noise_is_the_same_on_every_machine_and_version() -> None:
    expected = [0.04701636305119983, 0.1337942734953822, 0.7307940055939872, 0.7055308911376722]
    np.testing.assert_array_equal(sampling_noise(1, 2, "train-17", 3, 4), expected)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    np.testing.assert_array_equal(sampling_noise(1, 2, "a", 3, 100)[:7], sampling_noise(1, 2, "a", 3, 7))


def test_every_argument_changes_the_noise() -> None:
    names = [(1, 2, "a", 3), (2, 2, "a", 3), (1, 3, "a", 3), (1, 2, "b", 3), (1, 2, "a", 4), (12, 0, "a", 3)]
    assert len({sampling_noise(*name, 1)[0] for name in names}) == len(names)


def test_the_noise_is_uniform() -> None:
    draws = np.concatenate([sampling_noise(0, step, "a", answer, 50) for step in range(20) for answer in range(20)])
    assert draws.min() >= 0.0 and draws.max() < 1.0
    counts = np.histogram(draws, bins=50, range=(0, 1))[0]
    assert chisquare(counts).pvalue > 1e-3, counts


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    logits = torch.tensor([0.0, -1.0, -torch.inf, 2.0, 0.5, -torch.inf, 1.0])
    draws = 40_000
    uniforms = torch.from_numpy(sampling_noise(0, 0, "frequencies", 0, draws))
    ids = inverse_cdf(logits.log_softmax(-1).expand(draws, -1), uniforms)
    counts = torch.bincount(ids, minlength=7).numpy()
    allowed = logits.isfinite().numpy()
    assert not counts[~allowed].any(), counts
    expected = logits.softmax(-1).double().numpy()[allowed]
    assert chisquare(counts[allowed], draws * expected / expected.sum()).pvalue > 1e-3, counts


@given(
    st.lists(st.one_of(st.just(-np.inf), st.floats(-30, 30)), min_size=1, max_size=12),
    st.one_of(st.sampled_from([0.0, 1 - 2**-53, 0.5]), st.floats(0, 1, exclude_max=True)),
)
@settings(max_examples=300)
def test_an_id_without_mass_is_never_drawn_at_any_edge(logits: list[float], uniform: float) -> None:
    values = torch.tensor([*logits, -5.0] if not np.isfinite(logits).any() else logits)
    (drawn,) = inverse_cdf(values.log_softmax(-1)[None], torch.tensor([uniform], dtype=torch.float64)).tolist()
    assert 0 <= drawn < len(values) and values[drawn].isfinite(), f"{drawn} of {values.tolist()}"


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (1, 1.0), (0, 0.7), (-1, 0.05), (8, 0.8), (1000, 1.0)])
def test_filtered_logits_equal_the_librarys_warpers(top_k: int, top_p: float) -> None:
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits.clone()
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(filter_logits(logits, top_k, top_p), expected, rtol=0, atol=0)


def test_no_filter_leaves_the_logits_alone() -> None:
    logits = torch.randn(3, 10)
    assert filter_logits(logits, -1, 1.0) is logits and filter_logits(logits, 0, 1.0) is logits


def test_the_best_id_survives_the_smallest_top_p() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert filter_logits(logits, 0, 1e-9).isfinite().tolist() == [[False, True, False]]
