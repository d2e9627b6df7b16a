"""The actor process: a trained policy, its frozen reference where a KL term asks for one, checkpoints, weights out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from verl.config import PPOConfig, clip_range, uses_reference
from verl.config.nodes import Switch
from verl.models.freeze import parameter_table
from verl.models.lora import adapters_off, is_adapter
from verl.models.policy import Policy, check_model_folder
from verl.protocol import LogProbs, TrainGroup
from verl.utils.checkpoint.manager import Checkpoint
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import open_patches
from verl.utils.files import files_in
from verl.workers.actor.build import build_policy, build_runner, build_train_engine, load_engine, save_engine
from verl.workers.actor.engine import PackedRunner
from verl.workers.actor.merge import Merger
from verl.workers.actor.objective import PolicyObjective
from verl.workers.runtime import (
    compute_dtype,
    import_external,
    memory_metrics,
    resolve_device,
    start_process_group,
)
from verl.workers.weight_sync.sender import WeightSender

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
        self.patches = open_patches(stores, ImageSpec.from_pretrained(self.folder), self.device)
        actor, ref = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
        policy = self._policy(trained=True, offload=actor.fsdp_config.param_offload)
        self.engine = build_train_engine(
            self._runner(policy),
            actor.optim,
            actor.fsdp_config,
            clip_grad=actor.grad_clip,
            optimizer_steps=optimizer_steps,
        )
        self.objective = policy_objective(config)
        self.reference: PackedRunner | None = None
        """A model of its own; none where adapters are trained: the reference is then the actor without them."""
        if uses_reference(config) and policy.lora is None:
            self.reference = self._runner(self._policy(trained=False, offload=ref.fsdp_config.param_offload))
        self.weights = self._sender(policy)

    def _policy(self, *, trained: bool, offload: Switch) -> Policy:
        workers = self.config.actor_rollout_ref
        actor = workers.actor
        return build_policy(
            self.folder,
            self.tokenizer,
            workers.model,
            actor.fsdp_config,
            device=self.device,
            trained=trained,
            freeze_vision=trained and actor.freeze_vision_tower,
            frozen=actor.freeze if trained else (),
            offload=offload,
        )

    def _runner(self, policy: Policy) -> PackedRunner:
        return build_runner(policy, self.patches, self.device, self.config.actor_rollout_ref.rollout.temperature)

    def _sender(self, policy: Policy) -> WeightSender:
        rollout = self.config.actor_rollout_ref.rollout
        return WeightSender(
            {name: value for name, value in policy.hf.named_parameters() if not is_adapter(name)},
            dtype=compute_dtype(rollout.dtype, self.device),
            device=torch.device(self.device),
            max_bytes=rollout.checkpoint_engine.update_weights_bucket_megabytes << 20,
            merge=Merger(policy.hf),
        )

    def describe(self) -> str:
        reference = "none"
        if uses_reference(self.config):
            reference = "a frozen copy" if self.reference is not None else "the actor without its adapters"
        return f"reference: {reference}; {parameter_table(self.engine.policy.hf)}"

    def log_probs(self, micro_batches: MicroBatches) -> dict[int, LogProbs]:
        """Log-probs of this rank's samples under the present weights, by sample index."""
        return self.engine.runner.log_probs(micro_batches)

    def ref_log_probs(self, micro_batches: MicroBatches) -> dict[int, LogProbs]:
        """The same under the reference."""
        assert uses_reference(self.config), "no KL term asks for a reference, so there is none"
        if self.reference is not None:
            return self.reference.log_probs(micro_batches)
        with adapters_off(self.engine.policy):
            return self.engine.runner.log_probs(micro_batches)

    def update(self, mini_batches: Sequence[MiniBatch]) -> list[dict[str, float]]:
        """One optimizer step per mini-batch; this rank's metric sums of each."""
        return [self.engine.step(b.micro_batches, self.objective, b.tokens) for b in mini_batches]

    def save(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Write into the checkpoint's folder; returns the engine's clock."""
        dtype = compute_dtype(self.config.actor_rollout_ref.rollout.dtype, self.device)
        return save_engine(self.engine, checkpoint, source=self.folder, dtype=dtype)

    def written(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Files that this node sees in the checkpoint, those of this rank among them: relative path -> bytes."""
        return files_in(checkpoint.path)

    def load(self, checkpoint: Checkpoint, clock: dict[str, int] | None = None) -> None:
        """Restore what `save` wrote, on any number of ranks. Without `clock` the weights alone."""
        load_engine(self.engine, checkpoint, clock)

    def device_name(self) -> str | None:
        """CUDA's name of the device; None on a CPU."""
        return torch.cuda.get_device_name() if self.device == "cuda" else None

    def memory(self) -> dict[str, float]:
        return memory_metrics(self.device)

    def close(self) -> None:
        dist.destroy_process_group()


def policy_objective(config: PPOConfig) -> PolicyObjective:
    """The objective that the config asks for."""
    actor = config.actor_rollout_ref.actor
    clip_low, clip_high = clip_range(actor)
    correction = config.algorithm.rollout_correction
    options: dict[str, float | None] = {}
    if correction.loss_type == "reinforce":
        options["bound"] = None if correction.rollout_is is None else correction.rollout_is_threshold
    return PolicyObjective(
        loss_mode="reinforce" if correction.loss_type == "reinforce" else actor.policy_loss.loss_mode,
        loss_options=options,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_dual=actor.clip_ratio_c,
        kl_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_kind=actor.kl_loss_type,
        entropy_coef=actor.entropy_coeff,
    )
