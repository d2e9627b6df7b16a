"""Invariant on CUDA: the gradient does not depend on the cut, and is that of the padded forward; loss curves agree.

In fp32 to rounding. In bf16 the mean difference to the padded fp32 gradient is at most twice that of padded bf16 runs
cut into other micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import model_fixtures
import pytest
import torch
from model_fixtures import ODD, SMALL, WIDE, Maker, image_patches, open_policy, patch_source
from padded_reference import PaddedReference
from torch import Tensor, nn
from transformers import AutoTokenizer

from verl.models.policy import Policy, load_policy
from verl.protocol import TrainGroup
from verl.workers.actor.engine import PackedRunner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
TEMPERATURE = 0.8
Cut = Sequence[Sequence[TrainGroup]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_fixtures.write_tiny(tmp_path_factory.mktemp("invariance") / "tiny", sharpness=2.0)


@pytest.fixture(scope="module")
def groups(folder: Path) -> list[TrainGroup]:
    make = Maker(open_policy(folder).config, seed=5)
    return [
        make.group([40, 90, 10], WIDE),
        make.group([60]),
        make.group([30, 10, 50, 20, 80], SMALL, ODD),
        make.group([20, 70, 10, 30]),
    ]


def loss_of(log_probs: Tensor, groups: Sequence[TrainGroup]) -> Tensor:
    samples = [s for g in groups for s in g.samples]
    weights = torch.cat([torch.from_numpy(s.weights) * s.advantage for s in samples])
    return -(weights.to(log_probs.device) * log_probs).sum()


def policy_of(folder: Path, dtype: torch.dtype) -> Policy:
    """As the actor makes it."""
    return load_policy(folder, AutoTokenizer.from_pretrained(folder), dtype=dtype, compiled=True).to(CUDA)


def judge_of(folder: Path, dtype: torch.dtype) -> PaddedReference:
    banned = open_policy(folder).banned.nonzero()[:, 0].tolist()
    return PaddedReference(folder, banned, dtype=dtype, attention="sdpa", device="cuda")


def flat_gradient(model: nn.Module) -> Tensor:
    found = {name: p.grad.detach().float().flatten() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return torch.cat([found[name] for name in sorted(found)])


def packed_gradient(policy: Policy, cut: Cut) -> Tensor:
    runner = PackedRunner(policy, patch_source("cuda"), CUDA, TEMPERATURE)
    for micro in runner.micro_batches(cut, trained=True):
        loss_of(policy(micro.inputs, temperature=TEMPERATURE).log_probs, micro.groups).backward()
    return flat_gradient(policy.hf)


def padded_gradient(judge: PaddedReference, cut: Cut) -> Tensor:
    images = image_patches(patch_source("cuda"))
    for groups in cut:
        loss_of(judge(groups, images, TEMPERATURE, with_entropy=False)[0], groups).backward()
    return flat_gradient(judge.model)


def cuts(groups: list[TrainGroup]) -> list[Cut]:
    alone = [[TrainGroup(g.prompt, (s,))] for g in groups for s in g.samples]
    return [[groups], [[g] for g in groups], [groups[:1], groups[1:]], alone]


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().mean() / other.abs().mean()).item()


def test_invariant_2_in_fp32_every_cut_gives_the_padded_gradient(folder: Path, groups: list[TrainGroup]) -> None:
    expected = padded_gradient(judge_of(folder, torch.float32), [groups])
    policy = policy_of(folder, torch.float32)
    found = [distance(packed_gradient(policy, cut), expected) for cut in cuts(groups)]
    assert max(found) < 1e-4, f"mean differences {found}"


def test_in_bf16_packed_gradients_are_as_exact_as_padded_ones(folder: Path, groups: list[TrainGroup]) -> None:
    exact = padded_gradient(judge_of(folder, torch.float32), [groups])
    judge, policy = judge_of(folder, torch.bfloat16), policy_of(folder, torch.bfloat16)
    padded = [distance(padded_gradient(judge, cut), exact) for cut in cuts(groups)]
    packed = [distance(packed_gradient(policy, cut), exact) for cut in cuts(groups)]
    assert max(packed) <= 2 * max(padded), f"packed {packed}, padded {padded}"


def test_fifty_steps_of_packed_and_padded_training_have_one_loss_curve(folder: Path, groups: list[TrainGroup]) -> None:
    """bf16 compute on fp32 weights; the padded trainer's own distance between two cuts is the yardstick."""
    images = image_patches(patch_source("cuda"))

    def curve(padded: bool, cut: Cut) -> Tensor:
        judge, policy = judge_of(folder, torch.bfloat16), policy_of(folder, torch.bfloat16)
        runner = PackedRunner(policy, patch_source("cuda"), CUDA, TEMPERATURE)
        parameters = list((judge.model if padded else policy.hf).parameters())
        masters = [p.detach().float() for p in parameters]
        optimizer = torch.optim.AdamW(masters, lr=1e-3)
        losses = []
        for _ in range(50):
            total = 0.0
            for part in cut:
                if padded:
                    log_probs = judge(part, images, TEMPERATURE, with_entropy=False)[0]
                else:
                    log_probs = policy(runner.inputs(part), temperature=TEMPERATURE).log_probs
                loss = -log_probs.sum() / 1000
                loss.backward()
                total += loss.item()
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
            losses.append(total)
        return torch.tensor(losses)

    first, second, shared = curve(True, [groups]), curve(True, cuts(groups)[3]), curve(False, [groups])
    noise, found = (first - second).abs().mean().item(), (first - shared).abs().mean().item()
    assert first[-1] < 0.9 * first[0], "the curve must fall, or it shows nothing"
    assert found <= 2 * noise + 1e-3 * first[0].item(), f"packed to padded {found:.3g}, padded to padded {noise:.3g}"
