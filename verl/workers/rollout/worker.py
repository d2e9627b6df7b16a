"""The rollout process: one engine, fed with the actor's weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from verl.config import PPOConfig
from verl.models.policy import (
    banned_ids,
    check_model_folder,
    load_policy,
    model_config,
    parameter_shapes,
    stop_ids,
)
from verl.protocol import LogProbs, Prompt, Response, TokenIds
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import open_patches
from verl.workers.rollout.base import RolloutEngine, Sampling
from verl.workers.rollout.canary import plain_log_probs
from verl.workers.rollout.forward import Forwarder, Sink
from verl.workers.rollout.hf import HFEngine
from verl.workers.rollout.vllm_engine import VLLMEngine, model_facts
from verl.workers.rollout.vllm_plan import engine_arguments
from verl.workers.runtime import (
    compute_dtype,
    give_back_large_blocks,
    import_external,
    memory_metrics,
    resolve_device,
)
from verl.workers.weight_sync.receiver import WeightReceiver


@dataclass(frozen=True)
class Place:
    """Where a rollout process stands among the engines of the run."""

    engines: int = 1
    """Replicas in the run."""
    tp_rank: int = 0
    tp_size: int = 1
    address: tuple[str, int] | None = None
    """Where the `tp_size` processes of this engine meet; None when it is one."""

    def announce(self) -> None:
        """Tell vLLM's `external_launcher`, which reads torchrun's variables. Every process sees one GPU, its own."""
        if self.address is not None:
            host, port = self.address
            os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
            os.environ |= {"RANK": str(self.tp_rank), "WORLD_SIZE": str(self.tp_size)}


def build_engine(
    config: PPOConfig, stores: Sequence[Path], place: Place, *, waits_for_weights: bool
) -> tuple[RolloutEngine, Any]:
    """The engine that `actor_rollout_ref.rollout.name` asks for, and the tokenizer of its model.

    `waits_for_weights`: an actor will send them before the first answer.
    """
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    device = resolve_device(config.trainer.device)
    import_external(model.external_lib)
    folder = check_model_folder(model.path)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    spec = ImageSpec.from_pretrained(folder, min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels)
    patches = open_patches(stores, spec, device)
    if rollout.name == "vllm":
        place.announce()
        arguments = engine_arguments(
            config, folder=folder, spec=spec, device=device, engines=place.engines, waits_for_weights=waits_for_weights
        )
        facts = model_facts(folder, tokenizer, model.override_config)
        return VLLMEngine(arguments, patches, facts, device=device), tokenizer
    policy = load_policy(
        folder, tokenizer, dtype=compute_dtype(rollout.dtype, device), overrides=model.override_config
    ).to(device)
    engine = HFEngine(policy, patches, stop_ids=stop_ids(folder, tokenizer), batch_size=rollout.hf_batch_size)
    return engine, tokenizer


class RolloutWorker:
    """One process of an engine replica. Its weights are those of the last transfer."""

    def __init__(self, config: PPOConfig, stores: Sequence[Path], place: Place, waits_for_weights: bool) -> None:
        self.device = resolve_device(config.trainer.device)
        if self.device == "cuda":
            give_back_large_blocks()
        self.engine, self.tokenizer = build_engine(config, stores, place, waits_for_weights=waits_for_weights)
        model = config.actor_rollout_ref.model
        folder, self.overrides = check_model_folder(model.path), model.override_config
        self.shapes = parameter_shapes(folder, self.overrides)
        self.patches = open_patches(stores, ImageSpec.from_pretrained(folder))  # of the plain model, maybe on the CPU
        self.weights = WeightReceiver(self.engine, self.shapes, torch.device(self.device))

    def plain_log_probs(
        self, folder: Path, prompt: Prompt, answer: TokenIds, dtype: str, temperature: float
    ) -> tuple[LogProbs, str]:
        """Of `answer` by the plain model in `folder`, on this rank's GPU where it has room, else on the CPU; and where
        it was."""
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        vocabulary = model_config(folder, self.overrides).text_config.vocab_size
        needed = 1.5 * sum(math.prod(shape) for shape in self.shapes.values()) * kind.itemsize
        has_room = self.device == "cuda" and torch.cuda.mem_get_info()[0] > needed
        device = "cuda" if has_room else "cpu"
        found = plain_log_probs(
            folder,
            prompt,
            answer,
            self.patches,
            banned=banned_ids(folder, self.tokenizer, vocabulary),
            temperature=temperature,
            dtype=kind,
            device=device,
            overrides=self.overrides,
        )
        if has_room:
            torch.cuda.empty_cache()  # the engine shares the GPU with an actor, which needs what this model took
        return found, device

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
