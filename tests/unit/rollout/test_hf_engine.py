"""Invariants of the hf engine: the policy's own distribution, the same answers whatever the batch, no banned id."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from model_fixtures import ODD, SMALL, WIDE, WINDOW, Maker, image_patches, open_policy, rounded, write_tiny
from padded_reference import PaddedReference
from transformers import Qwen2_5_VLForConditionalGeneration

from verl.models.decode import DecodePlan
from verl.models.policy import Policy, make_inputs
from verl.packing.layout import pack
from verl.protocol import Prompt, Response, StopReason, TrainGroup, TrainSample
from verl.utils.dataset.patches import StoredPatches
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.hf import HFEngine, filter_logits

SAMPLING = Sampling(
    n=3,
    temperature=0.8,
    top_k=-1,
    top_p=1.0,
    do_sample=True,
    max_tokens=24,
    max_context=512,
    ignore_eos=False,
    seed=7,
)
GREEDY = dataclasses.replace(SAMPLING, n=1, do_sample=False)
OFTEN = tuple(range(40))
"""Stop ids that are drawn about once in seven tokens, so that answers end at very different lengths."""


@pytest.fixture
def prompts(make: Maker) -> list[Prompt]:
    grids = [(WIDE,), (), (SMALL, ODD), (SMALL,), (), (WINDOW,)]
    return [make.prompt(*g, text=3 + 2 * i) for i, g in enumerate(grids)]


def engine(
    policy: Policy, patches: StoredPatches, *, stop_ids: Sequence[int] = OFTEN, batch_size: int = 64
) -> HFEngine:
    return HFEngine(policy, patches, stop_ids=stop_ids, batch_size=batch_size)


def ids(answers: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[r.token_ids.tolist() for r in group] for group in answers]


def trainer_log_probs(
    policy: Policy, patches: StoredPatches, prompt: Prompt, answers: Sequence[Response], temperature: float
) -> np.ndarray:
    samples = tuple(TrainSample(i, r.token_ids, np.ones(len(r.token_ids), np.float32)) for i, r in enumerate(answers))
    batch = pack([TrainGroup(prompt, samples)], image_token_id=policy.config.image_token_id, merge_size=2)
    inputs = make_inputs(batch, patches(batch.image_keys), patches.dim, torch.device("cpu"))
    with torch.no_grad():
        return policy(inputs, temperature=temperature).log_probs.numpy()


def test_greedy_answers_equal_those_of_the_librarys_generate(
    prompts: list[Prompt], tiny_folder: Path, shared_policy: Policy, patches: StoredPatches
) -> None:
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_folder, dtype=torch.float32, attn_implementation="eager"
    )
    found = engine(shared_policy, patches).generate(prompts, GREEDY, step=0)
    for prompt, (answer,) in zip(prompts, found, strict=True):
        tokens = torch.from_numpy(prompt.token_ids).long()[None]
        pictures = {}
        if prompt.image_keys:
            pictures = {
                "pixel_values": patches(prompt.image_keys),
                "image_grid_thw": torch.tensor(prompt.image_grids),
            }
        expected = plain.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == plain.config.image_token_id).int(),
            do_sample=False,
            max_new_tokens=GREEDY.max_tokens,
            eos_token_id=list(OFTEN),
            suppress_tokens=shared_policy.banned.nonzero()[:, 0].tolist(),
            **pictures,
        )
        assert answer.token_ids.tolist() == expected[0, tokens.shape[1] :].tolist(), prompt.uid
    assert len({tuple(r.token_ids.tolist()) for (r,) in found}) > 1, "the prompts are not told apart"


@pytest.mark.parametrize("temperature", [0.8, 1.0, 1.7])
def test_sampler_log_probs_equal_the_trainers_also_after_groups_were_dropped(
    temperature: float, prompts: list[Prompt], shared_policy: Policy, patches: StoredPatches, monkeypatch
) -> None:
    dropped: list[int] = []
    keep = DecodePlan.keep
    monkeypatch.setattr(DecodePlan, "keep", lambda self, groups: (dropped.append(len(groups)), keep(self, groups))[1])
    sampling = dataclasses.replace(SAMPLING, temperature=temperature, max_tokens=80)
    found = engine(shared_policy, patches).generate(prompts, sampling, step=0)
    lengths = [len(r.token_ids) for group in found for r in group]
    assert len(dropped) >= 2 and max(lengths) > 8 * min(lengths), f"kept {dropped}, lengths {lengths}"
    for prompt, answers in zip(prompts, found, strict=True):
        expected = trainer_log_probs(shared_policy, patches, prompt, answers, temperature)
        sampled = np.concatenate([r.log_probs for r in answers])
        assert sampled.dtype == np.float32
        np.testing.assert_allclose(sampled, expected, rtol=0, atol=1e-5, err_msg=prompt.uid)


def test_answers_longer_than_the_caches_first_block_keep_the_trainers_log_probs(
    make: Maker, shared_policy: Policy, patches: StoredPatches
) -> None:
    prompt = make.prompt(SMALL)
    sampling = dataclasses.replace(SAMPLING, n=2, max_tokens=150, ignore_eos=True)
    (answers,) = engine(shared_policy, patches).generate([prompt], sampling, step=0)
    assert [len(r.token_ids) for r in answers] == [150, 150]
    expected = trainer_log_probs(shared_policy, patches, prompt, answers, sampling.temperature)
    np.testing.assert_allclose(np.concatenate([r.log_probs for r in answers]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (-1, 0.3), (20, 0.5)])
def test_filters_sample_only_inside_their_set_with_its_own_log_probs(
    top_k: int, top_p: float, make: Maker, tiny_folder: Path, shared_policy: Policy, patches: StoredPatches
) -> None:
    prompt = make.prompt(SMALL)
    sampling = dataclasses.replace(SAMPLING, n=64, max_tokens=1, top_k=top_k, top_p=top_p)
    (answers,) = engine(shared_policy, patches).generate([prompt], sampling, step=0)

    allowed = (~shared_policy.banned).nonzero()[:, 0].tolist()
    judge = PaddedReference(tiny_folder, shared_policy.banned.nonzero()[:, 0].tolist())
    one_each = TrainGroup(
        prompt, tuple(TrainSample(i, np.array([i], np.int32), np.ones(1, np.float32)) for i in allowed)
    )
    with torch.no_grad():
        every, _ = judge([one_each], image_patches(patches), sampling.temperature)
    ordered = every.sort(descending=True)
    inside = len(every) if top_k <= 0 else top_k
    if top_p < 1:
        mass = ordered.values[:inside].softmax(-1).cumsum(-1)
        inside = int((mass < top_p).sum()) + 1
    support = {allowed[i] for i in ordered.indices[:inside].tolist()}
    expected = dict(
        zip((allowed[i] for i in ordered.indices.tolist()), ordered.values[:inside].log_softmax(-1), strict=False)
    )
    drawn = [int(r.token_ids[0]) for r in answers]
    assert set(drawn) <= support and len(set(drawn)) > 1, f"{sorted(set(drawn) - support)} outside {sorted(support)}"
    for token, answer in zip(drawn, answers, strict=True):
        assert answer.log_probs[0] == pytest.approx(float(expected[token]), abs=1e-5)


def hugest_banned(folder: Path) -> Policy:
    """A policy whose unmasked logits are largest at banned ids: their rows are long, in opposite pairs."""
    policy = open_policy(folder)
    rows = policy.banned.nonzero()[:, 0]
    direction = torch.randn(policy.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0)) * 1000
    with torch.no_grad():
        for number, row in enumerate(rows):
            policy.vocabulary[row] = direction if number % 2 else -direction
    return policy


def test_invariant_8_banned_ids_are_never_drawn_even_when_their_logits_are_the_hugest(
    prompts: list[Prompt], tiny_folder: Path, patches: StoredPatches
) -> None:
    policy = hugest_banned(tiny_folder)
    banned = set(policy.banned.nonzero()[:, 0].tolist())
    assert len(banned) == 5
    drawn: dict[str, set[int]] = {}
    for name, sampling in {"sampled": SAMPLING, "greedy": GREEDY}.items():
        found = engine(policy, patches).generate(prompts, sampling, step=0)
        drawn[name] = {t for group in ids(found) for answer in group for t in answer}
        assert not drawn[name] & banned, f"{name}: {drawn[name] & banned}"
    free = hugest_banned(tiny_folder)
    free.banned[:] = False
    without_ban = engine(free, patches).generate(prompts, SAMPLING, step=0)
    assert {t for group in ids(without_ban) for answer in group for t in answer} <= banned, "the test tests nothing"


def test_the_trainer_gives_no_mass_to_what_the_sampler_may_not_draw(
    make: Maker, tiny_folder: Path, patches: StoredPatches
) -> None:
    policy = hugest_banned(tiny_folder)
    vocabulary = policy.config.text_config.vocab_size
    answers = [Response(np.array([i], np.int32), np.zeros(1, np.float32), StopReason.EOS) for i in range(vocabulary)]
    log_probs = trainer_log_probs(policy, patches, make.prompt(SMALL), answers, 0.8)
    assert np.array_equal(np.isneginf(log_probs), policy.banned.numpy())
    assert np.exp(log_probs.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)


def test_invariant_10_the_same_name_gives_the_same_answers_whatever_the_batch(
    prompts: list[Prompt], shared_policy: Policy, patches: StoredPatches
) -> None:
    expected = dict(
        zip(
            (p.uid for p in prompts),
            ids(engine(shared_policy, patches).generate(prompts, SAMPLING, step=4)),
            strict=True,
        )
    )
    batches = {
        "again": (prompts, 64),
        "reversed": (prompts[::-1], 64),
        "one prompt at a time": (prompts, 3),
        "two at a time": (prompts, 7),
        "a batch smaller than n": (prompts, 1),
        "fewer prompts": (prompts[2:4], 64),
    }
    for name, (chosen, batch_size) in batches.items():
        found = ids(engine(shared_policy, patches, batch_size=batch_size).generate(chosen, SAMPLING, step=4))
        assert found == [expected[p.uid] for p in chosen], name
    fewer = dataclasses.replace(SAMPLING, n=2)
    found = ids(engine(shared_policy, patches).generate(prompts, fewer, step=4))
    assert found == [expected[p.uid][:2] for p in prompts], "n"


@pytest.mark.parametrize("change", ["step", "seed", "uid"])
def test_another_name_gives_other_answers(
    change: str, prompts: list[Prompt], shared_policy: Policy, patches: StoredPatches
) -> None:
    run = engine(shared_policy, patches)
    first = ids(run.generate(prompts, SAMPLING, step=0))
    step = 1 if change == "step" else 0
    sampling = dataclasses.replace(SAMPLING, seed=8) if change == "seed" else SAMPLING
    others = [dataclasses.replace(p, uid=p.uid + "x") for p in prompts] if change == "uid" else prompts
    second = ids(run.generate(others, sampling, step=step))
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert all(len({tuple(answer) for answer in group}) == SAMPLING.n for group in first), "siblings are equal"


def test_greedy_answers_ignore_the_seed(prompts: list[Prompt], shared_policy: Policy, patches: StoredPatches) -> None:
    run = engine(shared_policy, patches)
    cold = dataclasses.replace(SAMPLING, n=1, temperature=0.0, seed=99)
    assert ids(run.generate(prompts, GREEDY, step=0)) == ids(run.generate(prompts, cold, step=5))


def test_an_answer_ends_at_a_stop_id_or_at_its_limit_and_says_which(
    prompts: list[Prompt], shared_policy: Policy, patches: StoredPatches
) -> None:
    found = engine(shared_policy, patches).generate(prompts, SAMPLING, step=0)
    for answer in (r for group in found for r in group):
        stops = np.isin(answer.token_ids, OFTEN)
        assert len(answer.token_ids) == len(answer.log_probs) <= SAMPLING.max_tokens
        assert not stops[:-1].any(), "tokens after a stop id"
        if answer.stop_reason is StopReason.EOS:
            assert stops[-1]
        else:
            assert not stops[-1] and len(answer.token_ids) == SAMPLING.max_tokens
    assert {r.stop_reason for group in found for r in group} == set(StopReason)


def test_a_stop_id_at_the_limit_is_a_stop(make: Maker, shared_policy: Policy, patches: StoredPatches) -> None:
    everything = range(shared_policy.config.text_config.vocab_size)
    sampling = dataclasses.replace(SAMPLING, max_tokens=1)
    (answers,) = engine(shared_policy, patches, stop_ids=everything).generate([make.prompt()], sampling, step=0)
    assert [(len(r.token_ids), r.stop_reason) for r in answers] == [(1, StopReason.EOS)] * 3


def test_ignore_eos_decodes_to_the_limit(prompts: list[Prompt], shared_policy: Policy, patches: StoredPatches) -> None:
    sampling = dataclasses.replace(SAMPLING, ignore_eos=True)
    found = engine(shared_policy, patches).generate(prompts, sampling, step=0)
    shapes = {(len(r.token_ids), r.stop_reason) for group in found for r in group}
    assert shapes == {(SAMPLING.max_tokens, StopReason.LENGTH)}


def test_prompt_and_answer_never_exceed_the_context(
    prompts: list[Prompt], shared_policy: Policy, patches: StoredPatches
) -> None:
    longest = max(len(p.token_ids) for p in prompts)
    sampling = dataclasses.replace(SAMPLING, ignore_eos=True, max_context=longest + 2)
    found = engine(shared_policy, patches).generate(prompts, sampling, step=0)
    for prompt, answers in zip(prompts, found, strict=True):
        room = min(SAMPLING.max_tokens, longest + 2 - len(prompt.token_ids))
        assert [len(r.token_ids) for r in answers] == [room] * 3, prompt.uid


def test_a_prompt_that_fills_the_context_is_an_error_with_its_uid(
    prompts: list[Prompt], shared_policy: Policy, patches: StoredPatches
) -> None:
    longest = max(prompts, key=lambda p: len(p.token_ids))
    sampling = dataclasses.replace(SAMPLING, max_context=len(longest.token_ids))
    with pytest.raises(ValueError, match=rf"{longest.uid}: a prompt of {len(longest.token_ids)} tokens"):
        engine(shared_policy, patches).generate(prompts, sampling, step=0)


def test_no_prompts_give_no_answers(shared_policy: Policy, patches: StoredPatches) -> None:
    assert engine(shared_policy, patches).generate([], SAMPLING, step=0) == []


def test_loaded_weights_decide_the_next_answers(
    prompts: list[Prompt], policy: Policy, patches: StoredPatches, tmp_path: Path
) -> None:
    other = open_policy(write_tiny(tmp_path / "other", seed=1))
    run = engine(policy, patches)
    before = ids(run.generate(prompts, SAMPLING, step=0))
    run.load_weights((name, value.detach().bfloat16()) for name, value in other.hf.named_parameters())
    rounded(other)
    after = ids(run.generate(prompts, SAMPLING, step=0))
    assert before != after == ids(engine(other, patches).generate(prompts, SAMPLING, step=0))


def test_weights_of_an_unknown_name_or_shape_are_refused(policy: Policy, patches: StoredPatches) -> None:
    run = engine(policy, patches)
    with pytest.raises(KeyError, match=r"model\.nothing"):
        run.load_weights([("model.nothing.weight", torch.zeros(1))])
    with pytest.raises(AssertionError, match=r"norm\.weight: \(64,\) here, got \(1,\)"):
        run.load_weights([("model.language_model.norm.weight", torch.zeros(1))])


def test_an_update_may_come_in_parts_and_must_be_whole_before_the_next_answers(
    prompts: list[Prompt], policy: Policy, patches: StoredPatches, tmp_path: Path
) -> None:
    other = open_policy(write_tiny(tmp_path / "other", seed=1))
    weights = list(other.hf.named_parameters())
    run = engine(policy, patches)
    run.begin_update()
    run.update_weights(weights[:5])
    with pytest.raises(AssertionError, match=f"{len(weights) - 5} weights are old"):
        run.generate(prompts, SAMPLING, step=0)
    with pytest.raises(AssertionError, match=f"{len(weights) - 5} weights did not arrive"):
        run.end_update()
    run.begin_update()
    run.update_weights(weights[:5])
    run.update_weights(weights[5:])
    run.end_update()
    after = ids(run.generate(prompts, SAMPLING, step=0))
    assert after == ids(engine(other, patches).generate(prompts, SAMPLING, step=0))


def test_filtering_does_not_change_what_is_inside() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert filter_logits(logits, 2, 1.0)[0].tolist() == [-torch.inf, 3.0, -torch.inf, 2.0]
