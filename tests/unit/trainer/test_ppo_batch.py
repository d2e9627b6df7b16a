"""Invariants of a step's way from scores to mini-batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.algorithms.advantage import grpo_advantage
from verl.protocol import Group, Prompt, Response, Score, StopReason
from verl.trainer.ppo.batch import (
    cut_mini_batches,
    penalise,
    permute_scores,
    response_tokens,
    sample_index,
    train_groups,
)

FAILED = Score.failed("timeout: 1 s")


def group(number: int, totals: list[float | None], lengths: list[int] | None = None) -> Group:
    lengths = lengths or [2 + i for i in range(len(totals))]
    prompt = Prompt(f"p{number}", number, "test", np.arange(4, dtype=np.int32), (), (), "A")
    responses = tuple(
        Response(np.full(n, 10 * number + i, np.int32), np.full(n, -1.0 - i, np.float32), StopReason.EOS)
        for i, n in enumerate(lengths)
    )
    scores = tuple(FAILED if t is None else Score.ok(t, {"label": t}, "A") for t in totals)
    return Group(prompt, responses, scores)


def built(
    groups: list[Group],
    members: list[int] | None = None,
    mode: str = "token-mean",
    old=None,
    ref=None,
    scale=None,
    **more,
):
    return train_groups(
        groups,
        [grpo_advantage(g.scores) for g in groups],
        range(len(groups)) if members is None else members,
        old=old or {},
        ref=ref or {},
        loss_agg_mode=mode,
        loss_scale_factor=scale,
        **more,
    )


MIXED = [group(0, [1, 0, None, 0]), group(1, [None, 1, None, None]), group(2, [0.5, 0.5, 1, 0])]


def test_failed_answers_and_groups_with_one_score_are_in_no_mini_batch() -> None:
    kept = [[s.index for s in g.samples] for g in built(MIXED)]
    assert kept == [[0, 1, 3], [8, 9, 10, 11]]


totals = st.lists(st.one_of(st.none(), st.integers(0, 10).map(lambda k: k / 10)), min_size=4, max_size=4)


@given(st.lists(totals, min_size=1, max_size=5), st.sampled_from(["token-mean", "seq-mean-token-mean"]))
@settings(max_examples=80)
def test_failed_answers_are_in_no_denominator(step, mode) -> None:
    samples = [s for g in built([group(i, t) for i, t in enumerate(step)], mode=mode) for s in g.samples]
    if samples:
        assert sum(s.weights.astype(float).sum() for s in samples) == pytest.approx(1.0, abs=1e-5)
    if mode == "token-mean":
        count = sum(len(s.token_ids) for s in samples)
        assert all(s.weights == pytest.approx(1 / count) for s in samples)


def test_denominators_are_those_of_the_mini_batch_alone() -> None:
    (alone,) = built(MIXED, members=[2])
    assert alone.samples[0].weights == pytest.approx(1 / (2 + 3 + 4 + 5))
    (scaled,) = built(MIXED, members=[2], mode="seq-mean-token-sum-norm", scale=10.0)
    assert all(s.weights == pytest.approx(1 / (4 * 10)) for s in scaled.samples)


def test_every_sample_carries_its_own_answer_and_columns() -> None:
    old = {i: np.full(2 + i % 4, -float(i), np.float32) for i in range(12)}
    ref = {i: np.full(2 + i % 4, -100.0 - i, np.float32) for i in range(12)}
    for g in built(MIXED, members=[2, 0], old=old, ref=ref, with_sampler=True):
        number = g.prompt.row
        advantages = grpo_advantage(MIXED[number].scores).values
        for s in g.samples:
            answer = s.index - sample_index(number, 0, 4)
            response = MIXED[number].responses[answer]
            assert s.token_ids is response.token_ids and s.rollout_log_probs is response.log_probs
            assert s.advantage == advantages[answer] and len(s.weights) == len(s.token_ids)
            assert s.old_log_probs is old[s.index] and s.ref_log_probs is ref[s.index]
    plain = [s for g in built(MIXED) for s in g.samples]
    assert all(s.old_log_probs is s.ref_log_probs is s.rollout_log_probs is None for s in plain)


def test_response_tokens_count_kept_answers() -> None:
    assert response_tokens(built(MIXED)) == (2 + 3 + 5) + (2 + 3 + 4 + 5)


@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_every_epoch_sees_every_group_once_and_only_the_first_mini_batch_is_first(count, size, epochs, shuffle) -> None:
    plans = cut_mini_batches(count, size=size, epochs=epochs, shuffle=shuffle, rng=np.random.default_rng(0))
    assert Counter(i for p in plans for i in p.members) == Counter(dict.fromkeys(range(count), epochs))
    assert [p.first for p in plans] == [number == 0 for number in range(len(plans))]
    per_epoch = -(-count // size)
    assert len(plans) == epochs * per_epoch and all(0 < len(p.members) <= size for p in plans)
    for epoch in range(epochs):
        members = [i for p in plans[epoch * per_epoch : (epoch + 1) * per_epoch] for i in p.members]
        assert sorted(members) == list(range(count))
        assert shuffle or members == list(range(count))


def test_shuffled_epochs_differ_and_the_same_generator_repeats_them() -> None:
    def plans(seed: int) -> list[tuple[int, ...]]:
        rng = np.random.default_rng(seed)
        return [p.members for p in cut_mini_batches(12, size=12, epochs=2, shuffle=True, rng=rng)]

    assert plans(1) == plans(1) != plans(2) and plans(1)[0] != plans(1)[1]


def test_permuted_scores_keep_their_multiset_and_nothing_else_moves() -> None:
    groups = [group(i, [i + k / 10 if k else None for k in range(4)]) for i in range(5)]
    dealt = permute_scores(groups, np.random.default_rng(0))
    before, after = ([s for g in gs for s in g.scores] for gs in (groups, dealt))
    assert Counter(map(id, before)) == Counter(map(id, after)) and list(map(id, before)) != list(map(id, after))
    assert all(a.prompt is b.prompt and a.responses is b.responses for a, b in zip(groups, dealt, strict=True))


def test_the_kl_penalty_lowers_the_totals_of_ok_answers_only() -> None:
    kl = {sample_index(g, i, 4): 0.5 * (g + i) for g in range(3) for i in range(4)}
    after = penalise(MIXED, kl, 0.1)
    for g, (old, new) in enumerate(zip(MIXED, after, strict=True)):
        for i, (was, now) in enumerate(zip(old.scores, new.scores, strict=True)):
            assert was.is_ok == now.is_ok
            if was.is_ok:
                assert now.total == pytest.approx(was.total - 0.1 * 0.5 * (g + i))
                assert (now.parts, now.prediction) == (was.parts, was.prediction)


def test_answers_without_a_kl_keep_their_score() -> None:
    after = penalise(MIXED, {0: 1.0}, 0.1)
    assert after[0].scores[0].total == pytest.approx(0.9) and after[0].scores[1] is MIXED[0].scores[1]
