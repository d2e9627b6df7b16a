"""Invariant on CUDA: the gradient does not depend on the cut, and is that of the padded forward; loss curves agree.

In fp32 to rounding. In bf16 what is asserted is exactness: the mean distance of log-probs and gradients to the padded
fp32 ones is at most twice the largest of padded bf16 runs, cut in several ways. The direct distance of packed to padded
bf16 is printed beside that of two padded bf16 runs, and not bounded by it: runs that differ in their cut alone may
differ in the order of a few sums, while packed and padded round in different places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import model_fixtures
import numpy as np
import pytest
import torch
import torch.distributed as dist
from model_fixtures import ODD, SMALL, WIDE, Maker, image_patches, open_policy, patch_source
from padded_reference import PaddedReference
from torch import Tensor, nn
from transformers import AutoTokenizer

from verl.models.policy import Policy, load_policy
from verl.protocol import TrainGroup
from verl.workers.actor.engine import PackedRunner, ShardSpec, TrainEngine, shard
from verl.workers.actor.objective import SFTObjective
from verl.workers.actor.optim import OptimSpec
from verl.workers.runtime import build_mesh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
TEMPERATURE = 0.8
STEPS = 50
SPEC = OptimSpec(
    lr=1e-3,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    clip_grad=0.0,
    warmup_steps=0,
    total_steps=STEPS,
    style="constant",
    min_lr_ratio=0.0,
)
Cut = Sequence[Sequence[TrainGroup]]
Pass = tuple[Tensor, Tensor]
"""Log-probs of all response tokens, which every cut keeps in order, and the flat gradient."""


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


def packed_pass(policy: Policy, cut: Cut) -> Pass:
    runner, found = PackedRunner(policy, patch_source("cuda"), CUDA, TEMPERATURE), []
    for micro in runner.micro_batches(cut, trained=True):
        found.append(policy(micro.inputs, temperature=TEMPERATURE).log_probs)
        loss_of(found[-1], micro.groups).backward()
    return torch.cat(found).detach(), flat_gradient(policy.hf)


def padded_pass(judge: PaddedReference, cut: Cut) -> Pass:
    images, found = image_patches(patch_source("cuda")), []
    for groups in cut:
        found.append(judge(groups, images, TEMPERATURE, with_entropy=False)[0])
        loss_of(found[-1], groups).backward()
    return torch.cat(found).detach(), flat_gradient(judge.model)


def cuts(groups: list[TrainGroup]) -> list[Cut]:
    """Prompts shared, but for the last: every answer with its own."""
    alone = [[TrainGroup(g.prompt, (s,))] for g in groups for s in g.samples]
    return [[groups], [[g] for g in groups], [groups[:1], groups[1:]], alone]


def distances(one: Pass, other: Pass) -> dict[str, float]:
    """Mean difference of the log-probs in nats, and of the gradient as a share of it."""
    log_probs, gradient = ((x.float() - y.float()).abs().mean() for x, y in zip(one, other, strict=True))
    return {"log-probs": log_probs.item(), "gradient": (gradient / other[1].abs().mean()).item()}


def test_invariant_2_in_fp32_every_cut_gives_the_padded_gradient(folder: Path, groups: list[TrainGroup]) -> None:
    expected = padded_pass(judge_of(folder, torch.float32), [groups])
    policy = policy_of(folder, torch.float32)
    found = [distances(packed_pass(policy, cut), expected) for cut in cuts(groups)]
    assert max(max(far.values()) for far in found) < 1e-4, f"mean differences {found}"


@pytest.mark.parametrize("what", ["log-probs", "gradient"])
def test_in_bf16_packed_is_as_exact_as_padded(what: str, folder: Path, groups: list[TrainGroup]) -> None:
    exact = padded_pass(judge_of(folder, torch.float32), [groups])
    judge, policy = judge_of(folder, torch.bfloat16), policy_of(folder, torch.bfloat16)
    padded = [padded_pass(judge, cut) for cut in cuts(groups)]
    packed = [packed_pass(policy, cut) for cut in cuts(groups)]
    noise = [distances(run, padded[0])[what] for run in padded[1:]]
    direct = [distances(run, padded[0])[what] for run in packed]
    print(f"bf16 {what}: packed to padded {direct}, padded to padded {noise}")
    usual, found = ([distances(run, exact)[what] for run in runs] for runs in (padded, packed))
    assert max(found) <= 2 * max(usual), f"to fp32: packed {found}, padded {usual}"


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def evenly_weighted(groups: Sequence[TrainGroup]) -> list[TrainGroup]:
    """Every response token weighs 1/1000."""
    return [
        replace(g, samples=tuple(replace(s, weights=np.full(len(s.token_ids), 1e-3, np.float32)) for s in g.samples))
        for g in groups
    ]


def packed_curve(folder: Path, cut: Cut) -> Tensor:
    """Losses of the trainer's own engine, on one rank."""
    policy = load_policy(folder, AutoTokenizer.from_pretrained(folder), dtype=torch.float32, compiled=True)
    spec = ShardSpec(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, offload=False)
    policy = shard(policy, build_mesh("cuda", -1), spec)
    engine = TrainEngine(PackedRunner(policy, patch_source("cuda"), CUDA, TEMPERATURE), SPEC)
    return torch.tensor([engine.step(cut, SFTObjective(), 1000)["loss"] for _ in range(STEPS)])


def padded_curve(folder: Path, cut: Cut) -> Tensor:
    """The same optimizer written out over plain transformers: bf16 compute, fp32 master weights."""
    judge, images = judge_of(folder, torch.bfloat16), image_patches(patch_source("cuda"))
    parameters = list(judge.model.parameters())
    masters = [p.detach().float() for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=SPEC.lr, betas=SPEC.betas, weight_decay=SPEC.weight_decay)
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for part in cut:
            loss = -1e-3 * judge(part, images, TEMPERATURE, with_entropy=False)[0].sum()
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


@pytest.mark.usefixtures("alone")
def test_fifty_steps_of_packed_and_padded_training_have_one_loss_curve(folder: Path, groups: list[TrainGroup]) -> None:
    """bf16 compute on fp32 weights. The yardstick is the padded trainer's own distance between cuts, the larger of two:
    one pair may happen to stay close."""
    whole, _, in_two, answers = cuts(evenly_weighted(groups))
    first = padded_curve(folder, whole)

    def apart(curve: Tensor) -> float:
        return (first - curve).abs().mean().item()

    noise = [apart(padded_curve(folder, cut)) for cut in (in_two, answers)]
    found = apart(packed_curve(folder, whole))
    assert first[-1] < 0.9 * first[0], "the curve must fall, or it shows nothing"
    assert found <= 2 * max(noise), f"packed to padded {found:.3g}, padded to padded {noise}"
