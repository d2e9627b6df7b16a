"""The actor process: a trained policy, its frozen reference where a KL term asks for one, checkpoints, weights out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from verl.config import PPOConfig, clip_range, uses_reference
from verl.models.policy import Policy, check_model_folder, load_policy
from verl.protocol import LogProbs, TrainGroup
from verl.utils.checkpoint.hf_export import export_huggingface
from verl.utils.checkpoint.manager import Checkpoint
from verl.utils.checkpoint.sharded import load_optimizer, load_sharded, model_state, save_optimizer, save_sharded
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import open_patches
from verl.workers.actor.engine import PackedRunner, ShardSpec, TrainEngine, full_parameters, shard
from verl.workers.actor.objective import PolicyObjective
from verl.workers.actor.optim import optim_spec
from verl.workers.runtime import (
    build_mesh,
    compute_dtype,
    import_external,
    memory_metrics,
    parameter_table,
    resolve_device,
    start_process_group,
)
from verl.workers.weight_sync.shared_memory import StoredBucket, publish

MicroBatches = Sequence[Sequence[TrainGroup]]


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step of one rank: its micro-batches, and the response tokens of the mini-batch over all ranks."""

    micro_batches: MicroBatches
    tokens: int


class ActorWorker:
    """One rank. All methods are collective: every rank is called, with its own share of the data."""

    def __init__(
        self,
        config: PPOConfig,
        rank: int,
        world: int,
        address: tuple[str, int],
        stores: Sequence[Path],
        optimizer_steps: int,
    ) -> None:
        self.config, self.rank = config, rank
        self.device = resolve_device(config.trainer.device)
        start_process_group(rank, world, address, self.device)
        model = config.actor_rollout_ref.model
        import_external(model.external_lib)
        self.folder = check_model_folder(model.path)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=model.trust_remote_code)
        self.patches = open_patches(stores, ImageSpec.from_pretrained(self.folder))
        self.engine = self._train_engine(optimizer_steps)
        self.objective = policy_objective(config)
        self.reference = self._reference() if uses_reference(config) else None

    def _policy(self, *, dtype: torch.dtype, offload: bool, checkpointing: bool, trained: bool) -> Policy:
        actor = self.config.actor_rollout_ref.actor
        policy = load_policy(
            self.folder,
            self.tokenizer,
            dtype=dtype,
            checkpointing=checkpointing,
            overrides=self.config.actor_rollout_ref.model.override_config,
        )
        policy.requires_grad_(trained)
        if actor.freeze_vision_tower:
            policy.hf.model.visual.requires_grad_(False)
        precision = actor.fsdp_config.mixed_precision
        spec = ShardSpec(
            param_dtype=compute_dtype(precision.param_dtype, self.device),
            reduce_dtype=compute_dtype(precision.reduce_dtype, self.device),
            offload=offload and self.device == "cuda",
        )
        mesh = build_mesh(self.device, actor.fsdp_config.fsdp_size)
        return shard(policy if spec.offload else policy.to(self.device), mesh, spec)

    def _runner(self, policy: Policy) -> PackedRunner:
        temperature = self.config.actor_rollout_ref.rollout.temperature
        return PackedRunner(policy, self.patches, torch.device(self.device), temperature)

    def _train_engine(self, optimizer_steps: int) -> TrainEngine:
        actor = self.config.actor_rollout_ref.actor
        policy = self._policy(
            dtype=compute_dtype(actor.fsdp_config.model_dtype, self.device),
            offload=actor.fsdp_config.param_offload,
            checkpointing=self.config.actor_rollout_ref.model.enable_gradient_checkpointing,
            trained=True,
        )
        spec = optim_spec(actor.optim, clip_grad=actor.grad_clip, optimizer_steps=optimizer_steps)
        return TrainEngine(self._runner(policy), spec)

    def _reference(self) -> PackedRunner:
        """The model at the start of training, never updated, in the compute precision."""
        config = self.config.actor_rollout_ref
        policy = self._policy(
            dtype=compute_dtype(config.actor.fsdp_config.mixed_precision.param_dtype, self.device),
            offload=config.ref.fsdp_config.param_offload,
            checkpointing=False,
            trained=False,
        )
        return self._runner(policy)

    def describe(self) -> str:
        return parameter_table(list(self.engine.policy.named_parameters()))

    def log_probs(self, micro_batches: MicroBatches) -> dict[int, LogProbs]:
        """Log-probs of this rank's samples under the present weights, by sample index."""
        return self.engine.runner.log_probs(micro_batches)

    def ref_log_probs(self, micro_batches: MicroBatches) -> dict[int, LogProbs]:
        """The same under the reference."""
        assert self.reference is not None, "no KL term asks for a reference, so there is none"
        return self.reference.log_probs(micro_batches)

    def update(self, mini_batches: Sequence[MiniBatch]) -> list[dict[str, float]]:
        """One optimizer step per mini-batch; this rank's metric sums of each."""
        return [self.engine.step(b.micro_batches, self.objective, b.tokens) for b in mini_batches]

    def publish_weights(self) -> list[StoredBucket]:
        """Put the weights where rollout workers read them; rank 0 returns the buckets, the others an empty list."""
        dtype = compute_dtype(self.config.actor_rollout_ref.rollout.dtype, self.device)
        return publish(full_parameters(self.engine.policy), dtype, keep=self.rank == 0)

    def save(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Write sharded model and optimizer and a Hugging Face copy; returns the engine's clock."""
        policy = self.engine.policy
        save_sharded(checkpoint.model, model_state(policy.hf))
        save_optimizer(checkpoint.optimizer, policy.hf, self.engine.optimizer)
        export_huggingface(
            policy.hf,
            checkpoint.huggingface,
            source=self.folder,
            dtype=compute_dtype(self.config.actor_rollout_ref.rollout.dtype, self.device),
            suppress_tokens=policy.banned.nonzero()[:, 0].tolist(),
        )
        return self.engine.clock()

    def load(self, checkpoint: Checkpoint, clock: dict[str, int] | None = None) -> None:
        """Restore what `save` wrote, on any number of ranks. Without `clock` the weights alone."""
        policy = self.engine.policy
        load_sharded(checkpoint.model, model_state(policy.hf))
        if clock is not None:
            load_optimizer(checkpoint.optimizer, policy.hf, self.engine.optimizer)
            self.engine.set_clock(clock)

    def memory(self) -> dict[str, float]:
        return memory_metrics(self.device)

    def close(self) -> None:
        dist.destroy_process_group()


def policy_objective(config: PPOConfig) -> PolicyObjective:
    """The objective that the config asks for."""
    actor = config.actor_rollout_ref.actor
    clip_low, clip_high = clip_range(actor)
    return PolicyObjective(
        loss_mode="vanilla",
        clip_low=clip_low,
        clip_high=clip_high,
        clip_dual=actor.clip_ratio_c,
        kl_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_kind=actor.kl_loss_type,
        entropy_coef=actor.entropy_coeff,
    )
