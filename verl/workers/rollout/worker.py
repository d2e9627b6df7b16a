"""The rollout process: one engine, fed with the actor's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from verl.config import PPOConfig
from verl.models.policy import check_model_folder, load_policy, parameter_shapes, stop_ids
from verl.protocol import Prompt, Response
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import open_patches
from verl.workers.rollout.base import RolloutEngine, Sampling
from verl.workers.rollout.forward import Forwarder, Sink
from verl.workers.rollout.hf import HFEngine
from verl.workers.runtime import compute_dtype, import_external, memory_metrics, resolve_device
from verl.workers.weight_sync.receiver import WeightReceiver


def build_engine(config: PPOConfig, stores: Sequence[Path]) -> tuple[RolloutEngine, Any]:
    """The engine that `actor_rollout_ref.rollout.name` asks for, and the tokenizer of its model."""
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    if rollout.name != "hf":
        raise ValueError(f"actor_rollout_ref.rollout.name={rollout.name} is not implemented yet: use hf")
    device = resolve_device(config.trainer.device)
    import_external(model.external_lib)
    folder = check_model_folder(model.path)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    policy = load_policy(
        folder, tokenizer, dtype=compute_dtype(rollout.dtype, device), overrides=model.override_config
    ).to(device)
    patches = open_patches(stores, ImageSpec.from_pretrained(folder))
    engine = HFEngine(policy, patches, stop_ids=stop_ids(folder, tokenizer), batch_size=rollout.hf_batch_size)
    return engine, tokenizer


class RolloutWorker:
    """One engine replica. Its weights are those of the last transfer."""

    def __init__(self, config: PPOConfig, stores: Sequence[Path]) -> None:
        self.device = resolve_device(config.trainer.device)
        self.engine, self.tokenizer = build_engine(config, stores)
        model = config.actor_rollout_ref.model
        shapes = parameter_shapes(check_model_folder(model.path), model.override_config)
        self.weights = WeightReceiver(self.engine, shapes, torch.device(self.device))

    def sleep(self, level: int) -> None:
        self.engine.sleep(level)

    def wake(self, tags: Sequence[str]) -> None:
        self.engine.wake(tags)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, sink: Sink | None = None, first: int = 0
    ) -> list[list[Response]]:
        """`sampling.n` answers for each prompt. With a `sink` they go there too, each as soon as it has ended; `first`
        is the number of the first prompt in the batch that the sink belongs to."""
        if sink is None:
            return self.engine.generate(prompts, sampling, step=step)
        with Forwarder(sink, self.tokenizer, first=first) as forward:
            responses = self.engine.generate(prompts, sampling, step=step, on_finished=forward)
            forward.rest(responses)
        return responses

    def memory(self) -> dict[str, float]:
        return memory_metrics(self.device)
