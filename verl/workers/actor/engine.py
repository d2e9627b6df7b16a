"""FSDP2 training of a policy over packed micro-batches, the same for SFT and RL.

Invariants
- The gradient does not depend on how a mini-batch is cut into micro-batches or spread over ranks: weights hold global
  denominators, and because FSDP2 averages gradients over ranks, the loss is multiplied by the world size.
- Every rank runs the same number of forwards and backwards; an empty micro-batch is a filler of weight 0.
- A step with a non-finite gradient changes nothing and is counted.
- A step waits for the device once, when its metrics and the gradient's norm are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from verl.models.lora import is_adapter
from verl.models.policy import ModelInputs, Policy, make_inputs
from verl.models.transfer import to_device
from verl.packing.columns import Columns, columns
from verl.packing.layout import pack
from verl.protocol import LogProbs, Prompt, TrainGroup, TrainSample
from verl.utils.dataset.patches import PatchSource
from verl.workers.actor.merge import Merger
from verl.workers.actor.objective import Metrics, Objective, merge_on_device
from verl.workers.actor.offload import OptimizerOffload
from verl.workers.actor.optim import OptimSpec, build_optimizer, lr_factor


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """How a model is sharded and in which precision it computes."""

    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    offload: bool
    reshard_after_forward: bool = True
    """False keeps the gathered weights from the first micro-batch of a step to the backward of its last: one gather a
    step instead of two a micro-batch, for a whole copy in `param_dtype` on every rank."""


def shard(
    policy: Policy, mesh: DeviceMesh, spec: ShardSpec, prepare: Callable[[nn.Module], None] = lambda _: None
) -> Policy:
    """Apply FSDP2 to every transformer block and to the root, in place; `prepare` sees each one just before."""
    options = {
        "mesh": mesh,
        # Inputs have the computing dtype, except the tower's angles, which the sampler's forward keeps in fp32 too.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=spec.param_dtype, reduce_dtype=spec.reduce_dtype, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy() if spec.offload else OffloadPolicy(),
        "reshard_after_forward": spec.reshard_after_forward,
    }
    for block in (*policy.hf.model.visual.blocks, *policy.hf.model.language_model.layers):
        prepare(block)
        fully_shard(block, **options)
    prepare(policy)
    fully_shard(policy, **options)
    policy.keep_gathered = not spec.reshard_after_forward
    return policy


def reshard(policy: Policy) -> None:
    """Drop gathered weights that a forward without a backward has left."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def filler_group(token_id: int) -> TrainGroup:
    """An empty micro-batch: one prompt and one answer of weight 0, so that every rank makes the same calls.

    It has the reference's column, which a KL term asks for; old log-probs are then those of its own forward.
    """
    ids = np.array([token_id], dtype=np.int32)
    prompt = Prompt("filler", -1, "", ids, (), (), "")
    zero = np.zeros(1, np.float32)
    return TrainGroup(prompt, (TrainSample(-1, ids, zero, ref_log_probs=zero),))


@dataclass(frozen=True)
class MicroBatch:
    """Groups (a filler where the plan has none) and what they are on the device."""

    groups: Sequence[TrainGroup]
    inputs: ModelInputs
    columns: Columns[Tensor] | None
    """None where no loss is computed."""


class PackedRunner:
    """Runs a policy over micro-batches of groups: packing, pixels, device transfer."""

    def __init__(self, policy: Policy, patches: PatchSource, device: torch.device, temperature: float) -> None:
        self.policy = policy
        self.patches = patches
        self.device = device
        self.temperature = temperature
        config = policy.config
        self._image_token, self._merge = config.image_token_id, config.vision_config.spatial_merge_size
        self.pack_ahead = device.type == "cuda"
        """Pack a micro-batch in a thread while the device computes the one before."""
        self._filler = [filler_group(int((~policy.banned).int().argmax()))]  # 0 times a banned id's -inf is nan

    def inputs(self, groups: Sequence[TrainGroup]) -> ModelInputs:
        batch = pack(groups, image_token_id=self._image_token, merge_size=self._merge)
        patches, shape = self.patches(batch.image_keys), self.policy.vision_shape
        return make_inputs(batch, patches, self.patches.dim, self.device, shape)

    def filled(self, groups: Sequence[TrainGroup]) -> Sequence[TrainGroup]:
        return groups or self._filler

    def micro_batches(self, plan: Sequence[Sequence[TrainGroup]], *, trained: bool) -> Iterator[MicroBatch]:
        """Every micro-batch of the plan on the device, in order; what a loss needs only where one is `trained` on."""
        make = partial(self._micro_batch, trained=trained)
        if not self.pack_ahead:
            yield from map(make, plan)
            return
        place = torch.cuda.current_device() if self.device.type == "cuda" else None
        start = (lambda: None) if place is None else (lambda: torch.cuda.set_device(place))
        with ThreadPoolExecutor(1, "pack", initializer=start) as pool:
            coming = pool.submit(make, plan[0]) if plan else None
            for number in range(1, len(plan) + 1):
                assert coming is not None
                ready = coming.result()
                coming = pool.submit(make, plan[number]) if number < len(plan) else None
                yield ready

    def _micro_batch(self, groups: Sequence[TrainGroup], *, trained: bool) -> MicroBatch:
        groups = self.filled(groups)
        return MicroBatch(groups, self.inputs(groups), self._columns(groups) if trained else None)

    def _columns(self, groups: Sequence[TrainGroup]) -> Columns[Tensor]:
        made = columns(groups)
        found = {field.name: getattr(made, field.name) for field in fields(Columns)}
        present = {name: value for name, value in found.items() if value is not None}
        moved = dict(zip(present, to_device(list(present.values()), self.device), strict=True))
        return Columns(**{name: moved.get(name) for name in found})

    @torch.no_grad()
    def log_probs(self, micro_batches: Sequence[Sequence[TrainGroup]]) -> dict[int, LogProbs]:
        """Log-probs (R,) of every sample, by sample index."""
        if not micro_batches:
            return {}
        samples: list[TrainSample] = []
        made: list[Tensor] = []
        for micro in self.micro_batches(micro_batches, trained=False):
            made.append(self.policy(micro.inputs, temperature=self.temperature, with_entropy=False).log_probs)
            samples += [s for g in micro.groups for s in g.samples]
        reshard(self.policy)
        bounds = np.cumsum([len(s.token_ids) for s in samples])[:-1]
        parts = np.split(torch.cat(made).float().cpu().numpy(), bounds)
        return {s.index: part for s, part in zip(samples, parts, strict=True) if s.index >= 0}


class TrainEngine:
    """A sharded policy with its optimizer. See the module's invariants."""

    def __init__(self, runner: PackedRunner, spec: OptimSpec, *, offload_optimizer: bool = False) -> None:
        self.runner = runner
        self.policy = runner.policy
        self.spec = spec
        self.optimizer = build_optimizer(self.policy, spec)
        self.offload = OptimizerOffload(self.optimizer) if offload_optimizer else None
        self.steps = 0
        """Optimizer steps so far, skipped ones included; the schedule's clock."""
        self.skipped = 0

    def step(
        self, micro_batches: Sequence[Sequence[TrainGroup]], objective: Objective, tokens: int
    ) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches of a mini-batch with `tokens` response tokens in all.

        Without micro-batches (every answer of the mini-batch failed) nothing is computed but the clock moves on.
        Returns this rank's metric sums (add them over ranks) and `grad_norm`, `lr`, `skipped` (equal on all ranks).
        """
        if not micro_batches:
            self.steps += 1
            self.skipped += 1
            return {"grad_norm": 0.0, "lr": self.spec.lr * lr_factor(self.steps - 1, self.spec), "skipped": 1.0}
        world = dist.get_world_size()
        pending: list[Metrics] = []
        for number, micro in enumerate(self.runner.micro_batches(micro_batches, trained=True)):
            self._last_micro_batch(number == len(micro_batches) - 1)
            stats = self.policy(
                micro.inputs, temperature=self.runner.temperature, entropy_grad=objective.needs_entropy_grad
            )
            assert micro.columns is not None
            loss, metrics = objective(stats, micro.columns, 1.0 / tokens)
            (loss * world).backward()
            if micro_batches[number]:
                pending.append(metrics)
        found = self._apply(merge_on_device(pending))
        return dict.fromkeys(objective.metric_names, 0.0) | found

    def clock(self) -> dict[str, int]:
        """What a checkpoint must remember beside tensors."""
        return {"steps": self.steps, "skipped": self.skipped}

    def set_clock(self, clock: dict[str, int]) -> None:
        self.steps, self.skipped = clock["steps"], clock["skipped"]

    def _last_micro_batch(self, last: bool) -> None:
        """Reduce gradients, and drop weights that were kept gathered, in the backward of the last micro-batch alone."""
        if isinstance(self.policy, FSDPModule):
            self.policy.set_requires_gradient_sync(last)
            self.policy.set_reshard_after_backward(last or not self.policy.keep_gathered)

    def _apply(self, metrics: Metrics) -> dict[str, float]:
        """Clip, read the metrics and the norm, and step unless the norm is not finite."""
        lr = self.spec.lr * lr_factor(self.steps, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = self.spec.clip_grad if self.spec.clip_grad > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Values come back together: every single one would be a wait for the device.
        values = torch.stack([*metrics.values(), norm.to(self.runner.device).double()]).tolist()
        found = dict(zip((*metrics, "grad_norm"), values, strict=True))
        finite = np.isfinite(found["grad_norm"])
        if finite:
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return found | {"lr": lr, "skipped": 0.0 if finite else 1.0}


def full_parameters(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and full tensors, one gather at a time, a tied head once, adapters merged. Every rank must
    iterate.

    Cast to `dtype`, if given, before the gather, so that half precision travels as such.
    """
    merge = Merger(policy.hf)
    for name, parameter in policy.hf.named_parameters():
        if is_adapter(name):
            continue
        value = parameter.detach() if dtype is None else parameter.detach().to(dtype)
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if merge.adapts(name):
            whole = whole.clone()  # it may be the parameter itself
            merge(name, whole)
        yield name, whole
