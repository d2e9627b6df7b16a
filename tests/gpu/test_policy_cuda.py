"""The whole packed policy and the hf engine on CUDA in bf16, against the same weights on the CPU in fp32."""

from __future__ import annotations

from pathlib import Path

import model_fixtures
import numpy as np
import pytest
import torch
from model_fixtures import ODD, SMALL, WIDE, WINDOW, Maker, gradients, open_policy, patch_source, rounded
from transformers import AutoTokenizer

from verl.models.log_probs import TokenStats
from verl.models.policy import Policy, load_policy, make_inputs
from verl.packing.layout import pack
from verl.protocol import TrainGroup, TrainSample
from verl.workers.actor.engine import PackedRunner
from verl.workers.actor.objective import SFTObjective
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.hf import HFEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_fixtures.write_tiny(tmp_path_factory.mktemp("cuda") / "tiny")


def on_cuda(folder: Path) -> Policy:
    return load_policy(folder, AutoTokenizer.from_pretrained(folder), dtype=torch.bfloat16).cuda()


def run(policy: Policy, groups: list[TrainGroup], temperature: float = 0.8) -> TokenStats:
    source = patch_source(policy.banned.device.type)
    batch = pack(groups, image_token_id=policy.config.image_token_id, merge_size=2)
    inputs = make_inputs(batch, source(batch.image_keys), source.dim, policy.banned.device)
    return policy(inputs, temperature=temperature, entropy_grad=True)


def batches(policy: Policy) -> dict[str, list[TrainGroup]]:
    make = Maker(policy.config)
    return {
        "images": [make.group([4, 9, 1], WIDE), make.group([6]), make.group([3, 1, 5, 2, 40], SMALL, ODD)],
        "text": [make.group([3, 20], text=200), make.group([1])],
    }


def test_patches_made_on_the_gpu_are_those_of_the_cpu_bit_for_bit() -> None:
    here, there = patch_source(), patch_source("cuda")
    keys = list(here.store)
    for some in (keys, keys[:1]):
        made = there(some)
        assert made is not None and made.is_cuda
        assert torch.equal(made.cpu(), here(some))
    assert there([]) is None


@pytest.mark.parametrize("name", ["images", "text"])
def test_log_probs_and_gradients_on_cuda_are_those_of_the_cpu_up_to_bf16(name: str, folder: Path) -> None:
    cuda, cpu = on_cuda(folder), rounded(open_policy(folder))
    groups = batches(cpu)[name]
    found, expected = run(cuda, groups), run(cpu, groups)
    error = (found.log_probs.cpu() - expected.log_probs).abs()
    assert error.max() < 0.1 and error.mean() < 0.02, f"largest {error.max():.3g}, mean {error.mean():.3g}"
    assert (found.entropy.cpu() - expected.entropy).abs().max() < 0.05
    for stats in (found, expected):
        (stats.log_probs.mean() + 0.1 * stats.entropy.mean()).backward()
    on_gpu, on_cpu = gradients(cuda), gradients(cpu)
    assert on_gpu.keys() == on_cpu.keys()
    one, other = (torch.cat([g[n].float().cpu().flatten() for n in on_cpu]) for g in (on_gpu, on_cpu))
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
    assert cosine > 0.99 and one.norm() == pytest.approx(other.norm(), rel=0.05), f"cosine {cosine}"


def test_sampler_log_probs_on_cuda_equal_the_trainers_up_to_bf16(folder: Path) -> None:
    policy = on_cuda(folder).requires_grad_(False)
    make = Maker(policy.config)
    prompts = [make.prompt(WIDE), make.prompt(), make.prompt(SMALL, ODD)]
    sampling = Sampling(
        n=4,
        temperature=0.8,
        top_k=-1,
        top_p=1.0,
        do_sample=True,
        max_tokens=40,
        max_context=512,
        ignore_eos=False,
        seed=7,
    )
    engine = HFEngine(policy, patch_source(), stop_ids=range(20), batch_size=64)
    answers = engine.generate(prompts, sampling, step=0)
    samples = [
        tuple(TrainSample(i, r.token_ids, np.ones(len(r.token_ids), np.float32)) for i, r in enumerate(group))
        for group in answers
    ]
    groups = [TrainGroup(p, s) for p, s in zip(prompts, samples, strict=True)]
    trainer = run(policy, groups).log_probs.cpu().numpy()
    sampler = np.concatenate([r.log_probs for group in answers for r in group])
    difference = np.abs(trainer - sampler)
    assert difference.max() < 0.1 and difference.mean() < 0.02, f"{difference.max():.3g}, {difference.mean():.3g}"
    banned = set(policy.banned.nonzero()[:, 0].tolist())
    assert not banned & {int(t) for group in answers for r in group for t in r.token_ids}


def test_forward_and_backward_do_not_wait_for_the_device(folder: Path) -> None:
    """Also where no micro-batch before had pictures of these sizes, in this order."""
    policy = on_cuda(folder)
    make = Maker(policy.config)
    run(policy, [make.group([3, 20, 1], WIDE)]).log_probs.sum().backward()  # kernels are chosen once
    plan = [
        [make.group([3, 20, 1], WIDE), make.group([5, 5], SMALL, ODD)],
        [make.group([4], ODD, WINDOW), make.group([7, 2])],
        [make.group([6, 3])],
    ]
    runner = PackedRunner(policy, patch_source("cuda"), torch.device("cuda"), 0.8)
    runner.pack_ahead = False
    torch.cuda.set_sync_debug_mode("error")
    try:
        for micro in runner.micro_batches(plan, trained=True):
            stats = policy(micro.inputs, temperature=0.8)
            loss, _ = SFTObjective()(stats, micro.columns, 0.1)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
