"""`generation.yaml` as frozen dataclasses: answers for the rows of a parquet file.

No field has a default: the yaml holds every value. The text under a field is its help.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from verl.config.engine_kwargs import engine_kwargs_problems
from verl.config.hdfs import no_input, no_output
from verl.config.nodes import Device, RolloutConfig
from verl.config.ppo import Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDataConfig:
    """The file, its columns and the output."""

    path: tuple[str, ...]
    """One parquet path or a list of paths."""
    prompt_key: str
    """Column with the chat messages, or a text."""
    image_key: str
    """Column with the images; a row without it is text only."""
    n_samples: int
    """Answers per row."""
    output_path: str
    """Parquet file to write: the input's columns and `responses`, a list of texts a row."""
    batch_size: int
    """Rows answered together; bounds memory, never changes an answer."""
    truncation: Truncation
    """What happens to a prompt longer than rollout.prompt_length; never a cut inside an image."""
    image_cache_dir: str | None
    """Folder of resized images; null: one in the user's cache."""
    min_pixels: int | None
    """Smallest image area; null: the model's preprocessor decides."""
    max_pixels: int | None
    """Largest image area; null: the model's preprocessor decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationModelConfig:
    """The model that answers."""

    path: str
    """A local folder or a hub id."""
    external_lib: str | None
    """A python module imported before the model is built."""
    trust_remote_code: bool
    """Run python code that comes with the tokenizer."""
    override_config: Mapping[str, Any]
    """Fields of the model's config.json to replace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTrainerConfig:
    """Where it runs."""

    device: Device
    """auto: cuda where there is one."""
    nnodes: int
    """Machines."""
    n_gpus_per_node: int
    """Engine ranks per machine; on CPU the number of processes."""
    ray_wait_timeout: float
    """Seconds that the start waits for the nodes and GPUs of the run, saying every 10 s what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Root of generation.yaml."""

    trainer: GenerationTrainerConfig
    data: GenerationDataConfig
    model: GenerationModelConfig
    rollout: RolloutConfig


def check_generation(config: GenerationConfig) -> list[str]:
    """Every problem of the config, [] when it can run."""
    return list(_problems(config))


def _problems(config: GenerationConfig) -> Iterator[str]:
    data, rollout, trainer = config.data, config.rollout, config.trainer
    sizes = {
        "trainer.nnodes": trainer.nnodes,
        "trainer.n_gpus_per_node": trainer.n_gpus_per_node,
        "trainer.ray_wait_timeout": trainer.ray_wait_timeout,
        "data.n_samples": data.n_samples,
        "data.batch_size": data.batch_size,
        "rollout.prompt_length": rollout.prompt_length,
        "rollout.response_length": rollout.response_length,
        "rollout.hf_batch_size": rollout.hf_batch_size,
    }
    yield from (f"{key}={value} must be greater than 0" for key, value in sizes.items() if value <= 0)
    if not data.path:
        yield "data.path is empty; give a parquet file"
    for path in data.path:
        yield from no_input("data.path", path)
    yield from no_input("model.path", config.model.path)
    yield from no_output("data.output_path", data.output_path)
    yield from no_output("data.image_cache_dir", data.image_cache_dir)
    if rollout.n != data.n_samples:
        yield f"rollout.n={rollout.n} follows data.n_samples={data.n_samples}; set data.n_samples"
    greedy = not rollout.do_sample or rollout.temperature == 0
    if greedy and data.n_samples > 1:
        yield f"data.n_samples={data.n_samples}: greedy answers are all the same; set data.n_samples=1"
    if rollout.temperature < 0:
        yield f"rollout.temperature={rollout.temperature} must not be negative"
    if rollout.top_k < -1 or rollout.top_k == 0:
        yield f"rollout.top_k={rollout.top_k} must be -1 (no limit) or at least 1"
    if not 0 < rollout.top_p <= 1:
        yield f"rollout.top_p={rollout.top_p} must be above 0 and at most 1"
    yield from engine_kwargs_problems("rollout", rollout)
    longest = rollout.prompt_length + rollout.response_length
    if rollout.max_model_len is not None and rollout.max_model_len < longest:
        yield f"rollout.max_model_len={rollout.max_model_len} is less than prompt_length + response_length = {longest}"
    tp = rollout.tensor_model_parallel_size
    if rollout.name == "vllm" and tp > 0 and trainer.n_gpus_per_node % tp:
        yield f"rollout.tensor_model_parallel_size={tp} does not divide trainer.n_gpus_per_node"
    if rollout.name == "vllm" and trainer.device == "cpu" and tp > 1:
        reason = "cuts the model over GPUs, and trainer.device=cpu has none; set it to 1"
        yield f"rollout.tensor_model_parallel_size={tp} {reason}"
