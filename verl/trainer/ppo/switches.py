"""From a config to a memory plan and back: `auto` becomes True or False before any worker is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.config import PPOConfig, token_budgets, uses_reference
from verl.config.derived import max_context, uses_adapters, world_size
from verl.config.engine_kwargs import given_cache
from verl.config.nodes import ActorRolloutRefConfig, ModelConfig
from verl.models.lora import adapter_count
from verl.models.policy import empty_model
from verl.models.sizes import ModelSizes
from verl.protocol import Prompt
from verl.trainer.ppo.memory import KEYS, Demand, MemoryPlan, Switches, plan_memory
from verl.workers.actor.build import chosen_model, lora_spec

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LargestPrompt:
    """What the longest prompt of the data holds."""

    tokens: int
    patches: int

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> LargestPrompt:
        """The maxima over prompts; they need not be of one prompt."""
        patches = [sum(t * h * w for t, h, w in prompt.image_grids) for prompt in prompts]
        return cls(max((len(p.token_ids) for p in prompts), default=0), max(patches, default=0))


def largest_micro_batch(config: PPOConfig, prompt: LargestPrompt, patch_weight: float) -> tuple[float, float]:
    """Text tokens and patches of an update's largest micro-batch; (0, 0) when nothing is trained.

    A micro-batch holds the most patches when its answers are short, so they are taken to be.
    """
    if config.trainer.val_only:
        return 0.0, 0.0
    budget, answers = token_budgets(config).update, config.actor_rollout_ref.rollout.n
    groups = -(-config.actor_rollout_ref.actor.ppo_mini_batch_size // world_size(config))
    most = groups * (prompt.tokens + answers * config.data.max_response_length)
    fitting = max(1.0, budget / (prompt.tokens + answers + patch_weight * prompt.patches))
    patches = min(float(groups), fitting) * prompt.patches
    return min(float(most), max(float(budget) - patch_weight * patches, float(prompt.tokens))), patches


def demand_of(config: PPOConfig, folder: Path, prompt: LargestPrompt, *, device: int) -> Demand:
    """What the run asks of one actor GPU of `device` bytes. `folder` holds the model's config.json."""
    workers, data = config.actor_rollout_ref, config.data
    actor, rollout, fsdp = workers.actor, workers.rollout, workers.actor.fsdp_config
    sizes = ModelSizes.from_folder(folder, workers.model.override_config)
    tokens, patches = largest_micro_batch(config, prompt, sizes.patch_weight)
    tp = rollout.tensor_model_parallel_size if rollout.name == "vllm" else 1
    engines = max(1, world_size(config) // tp)
    together = rollout.max_num_seqs if rollout.name == "vllm" else max(rollout.hf_batch_size, rollout.n)
    written = -(-data.train_batch_size // engines) * rollout.n
    return Demand(
        sizes=sizes,
        shards=world_size(config) if fsdp.fsdp_size == -1 else fsdp.fsdp_size,
        frozen_vision=actor.freeze_vision_tower,
        adapters=_adapters(workers.model, folder),
        trained=_trained(workers, folder),
        master=_BYTES[fsdp.model_dtype],
        compute=_BYTES[fsdp.mixed_precision.param_dtype],
        reduce=_BYTES[fsdp.mixed_precision.reduce_dtype],
        tokens=tokens,
        patches=patches,
        reference=uses_reference(config),
        engine=rollout.name if workers.hybrid_engine else "none",
        utilization=rollout.gpu_memory_utilization,
        given_cache=given_cache(rollout),
        tensor_parallel=tp,
        sequences=min(written, together),
        context=max_context(config),
        bucket=rollout.checkpoint_engine.update_weights_bucket_megabytes << 20,
        device=device,
    )


def _adapters(model: ModelConfig, folder: Path) -> int:
    """Parameters of the adapters that are trained; 0 without them."""
    lora = lora_spec(model)
    return 0 if lora is None else adapter_count(empty_model(folder, model.override_config), lora)


def _trained(workers: ActorRolloutRefConfig, folder: Path) -> int | None:
    """Parameters left to train where patterns freeze some, None without patterns. Raises ValueError for a pattern that
    fits nothing: here, before any worker is started."""
    if not workers.actor.freeze:
        return None
    return sum(p.numel() for p in chosen_model(workers, folder).parameters() if p.requires_grad)


def fixed_switches(config: PPOConfig) -> dict[str, bool]:
    """The switches that the config does not leave to the plan. `free_cache_engine=False` is only a wish."""
    workers = config.actor_rollout_ref
    fsdp, values = workers.actor.fsdp_config, {}
    values["sleep"] = True if workers.rollout.free_cache_engine else "auto"
    values["reshard_after_forward"] = fsdp.reshard_after_forward
    values["reference_offload"] = workers.ref.fsdp_config.param_offload
    values["optimizer_offload"] = fsdp.optimizer_offload
    values["checkpointing"] = workers.model.enable_gradient_checkpointing
    values["param_offload"] = fsdp.param_offload
    if workers.rollout.name != "vllm" or not workers.hybrid_engine:
        values["sleep"] = False  # nothing to drop, or nobody who wants the room
    if not uses_reference(config) or uses_adapters(workers.model):
        values["reference_offload"] = False
    return {name: value for name, value in values.items() if isinstance(value, bool)}


def with_switches(config: PPOConfig, switches: Switches) -> PPOConfig:
    """The config with every switch as decided; workers see no `auto`."""
    values: dict[str, Any] = {KEYS[name]: value for name, value in dataclasses.asdict(switches).items()}
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(node: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(node, **{name: _replaced(getattr(node, name), rest, value) if rest else value})


def without_plan(config: PPOConfig) -> PPOConfig:
    """On a CPU, or without an actor, nothing is planned: what is `auto` is off, but for resharding; nobody sleeps."""
    fixed = fixed_switches(config) | {"sleep": False}
    return with_switches(config, Switches(**({"reshard_after_forward": True} | fixed)))


def decide(config: PPOConfig, folder: Path, prompt: LargestPrompt, *, device: int) -> tuple[PPOConfig, MemoryPlan]:
    """The plan of a run on GPUs and its config without `auto`. Raises ValueError when the run cannot fit."""
    demand = demand_of(config, folder, prompt, device=device)
    plan = plan_memory(demand, fixed_switches(config))
    return with_switches(config, plan.switches), plan
