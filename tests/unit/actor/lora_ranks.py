"""One optimizer step of a model with adapters, and the weights that it sends: what the ranks of that test run."""

from __future__ import annotations

from pathlib import Path

import torch
from engine_ranks import CUTS, OBJECTIVE, SPEC, TEMPERATURE, mini_batch, response_tokens
from model_fixtures import open_policy, patch_source
from torch import Tensor
from torch.distributed.tensor import DTensor

from verl.models.lora import LoraSpec, add_adapters, is_adapter, merged
from verl.models.policy import Policy
from verl.workers.actor.engine import PackedRunner, ShardSpec, TrainEngine, shard
from verl.workers.actor.merge import Merger
from verl.workers.runtime import build_mesh
from verl.workers.weight_sync.gather import gather_into

LORA = LoraSpec(rank=3, alpha=6.0, target_modules=("all-linear",))
"""Rank 3: no adapter's first dimension divides by two ranks."""


def whole(policy: Policy) -> dict[str, Tensor]:
    """Every parameter in its own precision, copied."""
    found = {name: p.detach() for name, p in policy.hf.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in found.items()}


def adapted(folder: Path, compute: torch.dtype) -> Policy:
    """Weights in the computing precision, adapters in fp32, as `build_policy` makes them on CUDA."""
    policy = open_policy(folder)
    policy.hf.to(compute)
    policy.requires_grad_(False)
    policy.lora = LORA
    add_adapters(policy.hf, LORA, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.hf.named_parameters():
        if is_adapter(name):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def sent(sender: dict[str, Tensor], merge: Merger, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a bucket gets of every parameter."""
    found = {}
    for name, parameter in sender.items():
        flat = torch.full((parameter.numel(),), torch.nan, dtype=dtype)
        gather_into(parameter, flat)
        merge(name, flat)
        found[name] = flat.view(parameter.shape)
    return found


def both(rank: int, world: int, folder: str, out: str) -> None:
    """In one start of the ranks, which costs more than the rest."""
    for half in (False, True):
        step(rank, world, folder, out, half)


def step(rank: int, world: int, folder: str, out: str, half: bool) -> None:
    """Rank 0 writes `{world}-{half}.pt`: the adapters after the step, its metrics, and what is amiss (nothing)."""
    compute = torch.bfloat16 if half else torch.float32
    policy = adapted(Path(folder), compute)
    before = whole(policy)
    spec = ShardSpec(param_dtype=compute, reduce_dtype=torch.float32, offload=False, reshard_after_forward=False)
    shard(policy, build_mesh("cpu", -1), spec)
    merge = Merger(policy.hf)
    parameters = {name: p for name, p in policy.hf.named_parameters() if not is_adapter(name)}
    engine = TrainEngine(PackedRunner(policy, patch_source(), torch.device("cpu"), TEMPERATURE), SPEC)
    groups = mini_batch(policy)
    metrics = engine.step(CUTS["2 micro-batches"](groups, world)[rank], OBJECTIVE, response_tokens(groups))
    after = whole(policy)
    amiss = [f"{n} is {p.dtype}" for n, p in after.items() if p.dtype != (torch.float32 if is_adapter(n) else compute)]
    amiss += [f"{n} changed" for n, p in after.items() if not is_adapter(n) and not torch.equal(p, before[n])]
    amiss += [f"{n} did not" for n, p in after.items() if is_adapter(n) and torch.equal(p, before[n])]
    trained = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    assert trained == sum(p.numel() for n, p in after.items() if is_adapter(n))
    own = {n: p for n, p in after.items() if not is_adapter(n)}
    wanted = merged(own, {n: p for n, p in after.items() if is_adapter(n)}, LORA.scale)
    for gathered in (False, True):
        if gathered:  # modules then hold rounded copies, which must not be what is sent
            with torch.no_grad():
                policy(engine.runner.inputs(groups[1:2]), temperature=TEMPERATURE)
        found = sent(parameters, merge, compute)
        amiss += [f"{n} sent, gathered {gathered}" for n, p in wanted.items() if not torch.equal(found[n], p)]
    adapters = {n: p for n, p in after.items() if is_adapter(n)}
    if rank == 0:
        torch.save({"after": adapters, "metrics": metrics, "amiss": amiss}, f"{out}/{world}-{half}.pt")
