"""One mini-batch under every cut, on any number of ranks: what the ranks of the gradient tests run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from model_fixtures import ODD, SMALL, WIDE, Maker, gradients, open_policy, patch_source
from torch import Tensor

import verl.models.policy
from verl.models.log_probs import response_stats
from verl.models.policy import Policy, make_inputs
from verl.packing.balance import plan_mini_batch
from verl.packing.columns import columns
from verl.packing.layout import pack
from verl.protocol import TrainGroup
from verl.workers.actor.engine import PackedRunner, ShardSpec, TrainEngine, shard
from verl.workers.actor.objective import Metrics, PolicyObjective
from verl.workers.actor.optim import OptimSpec
from verl.workers.runtime import build_mesh

TEMPERATURE = 0.8
OBJECTIVE = PolicyObjective(
    loss_mode="vanilla",
    clip_low=0.2,
    clip_high=0.28,
    clip_dual=3.0,
    kl_coef=0.05,
    kl_kind="low_var_kl",
    entropy_coef=0.01,
)
SPEC = OptimSpec(
    lr=1e-3,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    clip_grad=1.0,
    warmup_steps=0,
    total_steps=10,
    style="constant",
    min_lr_ratio=0.0,
)
FP32 = ShardSpec(param_dtype=torch.float32, reduce_dtype=torch.float32, offload=False)

Cut = list[list[list[TrainGroup]]]
"""[rank][micro-batch] -> groups."""


def mini_batch(policy: Policy) -> list[TrainGroup]:
    """Uneven groups: 3 answers on an image, 1 and 8 on text, 5 on two images."""
    make = Maker(policy.config, seed=5)
    return [
        make.group([4, 9, 1], WIDE),
        make.group([6]),
        make.group([3, 1, 5, 2, 8], SMALL, ODD),
        make.group([2, 7, 1, 3, 3, 1, 4, 2]),
    ]


def singles(group: TrainGroup) -> list[TrainGroup]:
    return [dataclasses.replace(group, samples=(s,)) for s in group.samples]


def level(cut: Cut) -> Cut:
    most = max(len(micro_batches) for micro_batches in cut)
    return [micro_batches + [[] for _ in range(most - len(micro_batches))] for micro_batches in cut]


def deal(pieces: Sequence[TrainGroup], world: int, size: int) -> Cut:
    """Pieces dealt to ranks in turn, `size` a micro-batch."""
    shares = [list(pieces[rank::world]) for rank in range(world)]
    return level([[share[i : i + size] for i in range(0, len(share), size)] for share in shares])


def planned(groups: Sequence[TrainGroup], world: int) -> Cut:
    return plan_mini_batch(groups, ranks=world, token_budget=70, patch_weight=0.24)


def images_on_rank_zero(groups: Sequence[TrainGroup], world: int) -> Cut:
    cut: Cut = [[[g for g in groups if g.prompt.image_keys]], *[[] for _ in range(world - 1)]]
    for number, group in enumerate(g for g in groups if not g.prompt.image_keys):
        cut[1 + number % (world - 1) if world > 1 else 0].append([group])
    return level(cut)


def all_on_the_last_rank(groups: Sequence[TrainGroup], world: int) -> Cut:
    return level([*[[] for _ in range(world - 1)], [[groups[0], groups[3]], [groups[2]], [groups[1]]]])


def sub_groups(groups: Sequence[TrainGroup], world: int) -> Cut:
    return deal([piece for g in groups for piece in singles(g)], world, 3)


CUTS: dict[str, Callable[[Sequence[TrainGroup], int], Cut]] = {
    "1 micro-batch": lambda groups, world: deal(groups, world, 99),
    "2 micro-batches": lambda groups, world: deal(groups, world, -(-2 // world)),
    "sub-groups that repeat the prompt": sub_groups,
    "5 micro-batches": lambda groups, world: level([[[g] for g in groups] + [[]], *[[] for _ in range(world - 1)]]),
    "the plan of the driver": planned,
    "images on rank 0 alone": images_on_rank_zero,
    "everything on the last rank": all_on_the_last_rank,
}


class Recorder(TrainEngine):
    """Stops before the optimizer and keeps the gradient of the step."""

    found: dict[str, Tensor]

    def _apply(self, metrics: Metrics) -> dict[str, float]:
        self.found = gradients(self.policy)
        self.optimizer.zero_grad(set_to_none=True)
        return {name: float(value) for name, value in metrics.items()}


def frozen(policy: Policy) -> Policy:
    policy.hf.model.visual.requires_grad_(False)
    return policy


def recorder(policy: Policy, *, fsdp_size: int = -1, gathered: bool = False) -> Recorder:
    spec = dataclasses.replace(FP32, reshard_after_forward=not gathered)
    sharded = shard(policy, build_mesh("cpu", fsdp_size), spec)
    runner = PackedRunner(sharded, patch_source(), torch.device("cpu"), TEMPERATURE)
    runner.pack_ahead = gathered
    return Recorder(runner, SPEC)


def response_tokens(groups: Sequence[TrainGroup]) -> int:
    return sum(len(s.token_ids) for g in groups for s in g.samples)


def expected(policy: Policy) -> dict[str, Tensor]:
    """The gradient in one process, one micro-batch, without the engine or FSDP."""
    groups, source = mini_batch(policy), patch_source()
    batch = pack(groups, image_token_id=policy.config.image_token_id, merge_size=2)
    inputs = make_inputs(batch, source(batch.image_keys), source.dim, torch.device("cpu"))
    stats = policy(inputs, temperature=TEMPERATURE, entropy_grad=True)
    loss, _ = OBJECTIVE(stats, columns(groups), 1.0 / response_tokens(groups))
    loss.backward()
    return gradients(policy)


def run_cuts(rank: int, world: int, model: str, out: str, names: Sequence[str], fsdp_size: int, variant: str) -> None:
    """Every cut on one engine; each rank writes its metric sums, rank 0 the gradients too."""
    policy = open_policy(Path(model), checkpointing=variant == "checkpointed")
    policy = frozen(policy) if variant == "frozen" else policy
    engine = recorder(policy, fsdp_size=fsdp_size, gathered=variant == "gathered")
    groups = mini_batch(policy)
    if variant == "checkpointed":
        verl.models.policy.response_stats = functools.partial(response_stats, chunk=3)
    found = {}
    for name in names:
        metrics = engine.step(CUTS[name](groups, world)[rank], OBJECTIVE, response_tokens(groups))
        found[name] = (engine.found if rank == 0 else {}, metrics)
    torch.save(found, Path(out) / f"{variant}-{rank}.pt")
    dist.barrier()
