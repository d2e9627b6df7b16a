"""What `VLLMEngine` promises, on any device: the same tests run on the CPU build and on a GPU.

A subclass gives the fixtures `host`, `prompts`, `policy`, `patches`, `other` (weights of a second model, by name) and
says how far log-probs of the two engines may be apart. One engine serves all tests; a test that changes it restores it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from model_fixtures import open_policy
from vllm_host import Host, RemoteError

from verl.models.policy import Policy, make_inputs
from verl.packing.layout import pack
from verl.protocol import Prompt, Response, StopReason, TrainGroup, TrainSample
from verl.utils.dataset.patches import PatchSource
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.hf import HFEngine

OFTEN = tuple(range(40))
"""Stop ids that are drawn about once in seven tokens, so that answers end at very different lengths."""
SAMPLING = Sampling(
    n=3, temperature=0.8, top_k=-1, top_p=1.0, do_sample=True, max_tokens=24, max_context=500, ignore_eos=False, seed=7
)
GREEDY = dataclasses.replace(SAMPLING, n=1, do_sample=False, ignore_eos=True)

Weights = Mapping[str, np.ndarray]


def ids(answers: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[r.token_ids.tolist() for r in group] for group in answers]


def weights_of(folder: Path) -> Weights:
    return {name: value.detach().numpy() for name, value in open_policy(folder).hf.named_parameters()}


def packed_log_probs(
    policy: Policy, patches: PatchSource, prompt: Prompt, answers: Sequence[Response], temperature: float
) -> np.ndarray:
    """Of all answers' tokens one after another, as the actor computes them."""
    samples = tuple(TrainSample(i, r.token_ids, np.ones(len(r.token_ids), np.float32)) for i, r in enumerate(answers))
    batch = pack([TrainGroup(prompt, samples)], image_token_id=policy.config.image_token_id, merge_size=2)
    inputs = make_inputs(batch, patches(batch.image_keys), patches.dim, policy.banned.device)
    with torch.no_grad():
        return policy(inputs, temperature=temperature).log_probs.float().cpu().numpy()


class EngineContract:
    """See the module docstring."""

    max_difference: float
    """Largest difference of a log-prob."""
    mean_difference: float

    def assert_near(self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], what: str) -> None:
        apart = np.abs(np.concatenate(found) - np.concatenate(expected))
        assert len(apart) > 0
        assert apart.max() <= self.max_difference, f"{what}: worst {apart.max():.3g}, bound {self.max_difference}"
        assert apart.mean() <= self.mean_difference, f"{what}: mean {apart.mean():.3g}, bound {self.mean_difference}"

    def test_sampler_log_probs_equal_the_packed_forwards(
        self, host: Host, prompts: list[Prompt], policy: Policy, patches: PatchSource
    ) -> None:
        for temperature in (0.8, 1.0, 1.7):
            sampling = dataclasses.replace(SAMPLING, temperature=temperature)
            answers, _ = host.generate(prompts, sampling, 0)
            expected = [
                packed_log_probs(policy, patches, p, a, temperature) for p, a in zip(prompts, answers, strict=True)
            ]
            found = [np.concatenate([r.log_probs for r in group]) for group in answers]
            self.assert_near(found, expected, f"temperature {temperature}")

    def test_greedy_log_probs_equal_the_packed_forwards(
        self, host: Host, prompts: list[Prompt], policy: Policy, patches: PatchSource
    ) -> None:
        answers, _ = host.generate(prompts, GREEDY, 0)
        expected = [packed_log_probs(policy, patches, p, a, 1.0) for p, a in zip(prompts, answers, strict=True)]
        self.assert_near([group[0].log_probs for group in answers], expected, "greedy")

    def test_the_same_seed_gives_the_same_answers_and_another_name_others(
        self, host: Host, prompts: list[Prompt]
    ) -> None:
        once, _ = host.generate(prompts, SAMPLING, 3)
        again, _ = host.generate(prompts, SAMPLING, 3)
        assert ids(again) == ids(once)
        assert all(len({tuple(a) for a in group}) > 1 for group in ids(once)), (
            "the answers of a prompt share their noise"
        )
        renamed = [dataclasses.replace(prompt, uid=f"other-{prompt.uid}") for prompt in prompts]
        for changed, _ in (
            host.generate(prompts, SAMPLING, 4),
            host.generate(prompts, dataclasses.replace(SAMPLING, seed=8), 3),
            host.generate(renamed, SAMPLING, 3),
        ):
            assert ids(changed) != ids(once)

    def test_banned_ids_are_never_drawn(self, host: Host, prompts: list[Prompt], policy: Policy) -> None:
        # vLLM takes temperatures up to 2.
        flat = dataclasses.replace(SAMPLING, n=16, temperature=2.0, max_tokens=64, ignore_eos=True)
        answers, _ = host.generate(prompts, flat, 0)
        drawn = np.concatenate([r.token_ids for group in answers for r in group])
        banned = policy.banned.nonzero().flatten().tolist()
        expected = len(drawn) * len(banned) / policy.config.text_config.vocab_size
        assert expected > 20, f"{len(drawn)} near uniform draws would hit a banned id {expected:.0f} times: too few"
        assert not np.isin(drawn, banned).any()

    def test_an_answer_ends_at_a_stop_id_or_at_its_limit_and_says_which(
        self, host: Host, prompts: list[Prompt]
    ) -> None:
        answers, _ = host.generate(prompts, dataclasses.replace(SAMPLING, n=8), 0)
        flat = [r for group in answers for r in group]
        for r in flat:
            assert not np.isin(r.token_ids[:-1], OFTEN).any(), r
            stopped = bool(np.isin(r.token_ids[-1], OFTEN))
            assert r.stop_reason is (StopReason.EOS if stopped else StopReason.LENGTH), r
            assert stopped or len(r.token_ids) == SAMPLING.max_tokens, r
        assert {r.stop_reason for r in flat} == set(StopReason), "one kind of end never came up"

    def test_ignore_eos_writes_to_the_limit(self, host: Host, prompts: list[Prompt]) -> None:
        answers, _ = host.generate(prompts, dataclasses.replace(SAMPLING, ignore_eos=True), 0)
        ends = {(len(r.token_ids), r.stop_reason) for group in answers for r in group}
        assert ends == {(SAMPLING.max_tokens, StopReason.LENGTH)}

    def test_prompt_and_answer_never_exceed_the_context(self, host: Host, prompts: list[Prompt]) -> None:
        longest = max(len(p.token_ids) for p in prompts)
        tight = dataclasses.replace(SAMPLING, max_context=longest + 4, ignore_eos=True)
        answers, _ = host.generate(prompts, tight, 0)
        found = [{len(r.token_ids) for r in group} for group in answers]
        assert found == [{min(24, longest + 4 - len(p.token_ids))} for p in prompts]
        full = dataclasses.replace(SAMPLING, max_context=longest)
        with pytest.raises(RemoteError, match=f"ValueError: .*a prompt of {longest} tokens leaves no room"):
            host.generate(prompts, full, 0)
        assert ids(host.generate(prompts, SAMPLING, 3)[0]) == ids(host.generate(prompts, SAMPLING, 3)[0])

    def test_every_answer_is_reported_once_and_the_first_while_others_are_written(
        self, host: Host, prompts: list[Prompt]
    ) -> None:
        answers, reports = host.generate(prompts, SAMPLING, 0)
        assert sorted((p, a) for p, a, _, _ in reports) == [(p, a) for p in range(len(prompts)) for a in range(3)]
        for prompt, answer, response, _ in reports:
            assert response.token_ids.tolist() == answers[prompt][answer].token_ids.tolist()
        assert reports[0][3] > 0, "the first report came when all answers had ended"

    def test_no_image_is_kept_once_its_answers_have_ended(self, host: Host, prompts: list[Prompt]) -> None:
        for step in range(3):
            host.generate(prompts, SAMPLING, step)
            assert host.patches_held() == 0, f"after step {step}"

    def test_no_prompts_give_no_answers(self, host: Host) -> None:
        assert host.generate([], SAMPLING, 0) == ([], [])

    def test_an_update_in_parts_decides_the_next_answers_also_of_images_seen_before(
        self, host: Host, prompts: list[Prompt], policy: Policy, patches: PatchSource, other: Weights
    ) -> None:
        mine = weights_held(policy)
        before = ids(host.generate(prompts, GREEDY, 0)[0])
        names = list(other)
        cuts = [names[i::3] for i in range(3)]
        host.update([{name: other[name] for name in cut} for cut in cuts])
        try:
            answers, _ = host.generate(prompts, GREEDY, 0)
            assert ids(answers) != before
            changed = policy_with(policy, other)
            expected = [packed_log_probs(changed, patches, p, a, 1.0) for p, a in zip(prompts, answers, strict=True)]
            self.assert_near([group[0].log_probs for group in answers], expected, "after the update")
        finally:
            policy_with(policy, mine)
            host.update([mine])
        assert ids(host.generate(prompts, GREEDY, 0)[0]) == before

    def test_an_update_must_be_whole_and_of_this_model(self, host: Host, prompts: list[Prompt], policy: Policy) -> None:
        mine = weights_held(policy)
        before = ids(host.generate(prompts, GREEDY, 0)[0])
        first, rest = dict(list(mine.items())[:4]), len(mine) - 4
        with pytest.raises(RemoteError, match=f"AssertionError: {rest} weights did not arrive"):
            host.update([first])
        with pytest.raises(RemoteError, match=f"AssertionError: {rest} weights are old"):
            host.generate(prompts, GREEDY, 0)
        with pytest.raises(RemoteError, match=r"KeyError: .*model\.nothing"):
            host.update([{"model.nothing": np.zeros(1, np.float32)}])
        name = "model.language_model.norm.weight"
        with pytest.raises(
            RemoteError, match=r"AssertionError: model\.language_model\.norm\.weight: \(\d+,\) here, got"
        ):
            host.update([{name: np.zeros(1, np.float32)}])
        host.update([mine])
        assert ids(host.generate(prompts, GREEDY, 0)[0]) == before

    def test_a_weight_that_vllm_passes_over_is_noticed_at_the_first_update(
        self, host: Host, prompts: list[Prompt], policy: Policy
    ) -> None:
        mine = weights_held(policy)
        before = ids(host.generate(prompts, GREEDY, 0)[0])
        sent = "model.language_model.layers.1.mlp.down_proj.weight"
        parts = [dict(list(mine.items())[i::3]) for i in range(3)]
        left = r"left 1 without: language_model\.model\.layers\.1\.mlp\.down_proj\.weight\."
        with pytest.raises(RemoteError, match=f"RuntimeError: vLLM .*{len(mine)} weights into .*{left}"):
            host.update_past(parts, sent)
        with pytest.raises(RemoteError, match="weights are old"):
            host.generate(prompts, GREEDY, 0)
        host.update([mine])
        assert ids(host.generate(prompts, GREEDY, 0)[0]) == before


def weights_held(policy: Policy) -> Weights:
    """A copy, by Hugging Face name."""
    return {name: value.detach().float().cpu().numpy().copy() for name, value in policy.hf.named_parameters()}


def policy_with(policy: Policy, weights: Weights) -> Policy:
    """The policy itself, with other weights."""
    with torch.no_grad():
        for name, parameter in policy.hf.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    return policy


def hf_engine(policy: Policy, patches: PatchSource) -> HFEngine:
    return HFEngine(policy, patches, stop_ids=OFTEN, batch_size=64)
