"""What vLLM is asked for: engine arguments from the config, and what an answer's request holds. Imports no vLLM.

Invariants
- Every rollout key of the yaml that concerns vLLM is in the engine's arguments; `engine_kwargs.vllm` may add others and
  replace some (`verl.config.engine_kwargs` refuses the rest), but none that several ranks of an engine need alike.
- The largest batch of a step decodes in a captured CUDA graph.
- An answer's seed is a function of (run seed, step, uid, answer index) alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl.config import PPOConfig
from verl.config.derived import max_context
from verl.protocol import TokenIds
from verl.utils.dataset.images import ImageSpec
from verl.workers.rollout.base import Sampling

MAX_LISTED_IDS = 1024
"""Most ids that one request may ban or allow (vLLM's V2 model runner holds a table of that width)."""
_BAN = -100.0  # the lowest bias that vLLM takes
_UNKNOWN_BATCH = 256  # answers at a time of a program that knows neither batch (main_generation)


def engine_arguments(
    config: PPOConfig, *, folder: Path, spec: ImageSpec, device: str, engines: int, waits_for_weights: bool
) -> dict[str, Any]:
    """Keyword arguments of vLLM's `EngineArgs` for one of `engines` replicas.

    `waits_for_weights`: the actor will send them, so nothing need be read from the disk. Raises ValueError on a key of
    `engine_kwargs.vllm` that an engine of several ranks does not leave to the user.
    """
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    key = "actor_rollout_ref.rollout"
    given = dict(rollout.engine_kwargs.vllm)
    tp = rollout.tensor_model_parallel_size
    together = tensor_parallel(tp, device)
    if taken := sorted(together.keys() & given.keys()):
        raise ValueError(f"{key}.engine_kwargs.vllm.{taken[0]}={given[taken[0]]} is set by the program: remove it")
    arguments: dict[str, Any] = {
        "model": str(folder),
        "trust_remote_code": model.trust_remote_code,
        "hf_overrides": {"text_config": dict(model.override_config)} if model.override_config else {},
        "dtype": "float32" if device == "cpu" else rollout.dtype,
        "load_format": rollout.load_format if waits_for_weights and device == "cuda" else "auto",
        "seed": rollout.seed % 2**31,
        "max_model_len": max_context(config),
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_chunked_prefill": rollout.enable_chunked_prefill,
        "enable_prefix_caching": True,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "disable_log_stats": rollout.disable_log_stats,
        "enforce_eager": rollout.enforce_eager or device == "cpu",
        "limit_mm_per_prompt": {"video": 0},
        "mm_processor_cache_gb": 0,
        "use_tqdm_on_load": False,
        "mm_processor_kwargs": {"max_pixels": largest_image(spec, config.data.max_prompt_length)},
    }
    if device == "cuda":
        arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        arguments["enable_sleep_mode"] = rollout.free_cache_engine
        if not rollout.enforce_eager:
            sizes = rollout.cudagraph_capture_sizes or capture_sizes(decoded_together(config, engines))
            arguments["cudagraph_capture_sizes"] = list(sizes)
    return arguments | together | given


def tensor_parallel(size: int, device: str) -> dict[str, Any]:
    """Arguments of an engine of `size` ranks, each a process of its own that sees one GPU and schedules for itself.

    - All ranks must cut their batches alike. Asynchronous scheduling looks whether the last step has ended, and some
      versions of vLLM end it in a thread: two ranks could then disagree, and wait for each other for ever.
    - There is no peer to map: custom all-reduce and the fused one (FlashInfer) address the others' GPUs by index.
    """
    if size == 1:
        return {"tensor_parallel_size": 1}
    arguments: dict[str, Any] = {
        "tensor_parallel_size": size,
        "distributed_executor_backend": "external_launcher",
        "disable_custom_all_reduce": True,
        "async_scheduling": False,
    }
    if device == "cuda":
        arguments["compilation_config"] = {"pass_config": {"fuse_allreduce_rms": False}}
    return arguments


def decoded_together(config: PPOConfig, engines: int) -> int:
    """Most answers that one of `engines` decodes at a time; the driver counts a validation in one batch of all rows."""
    rollout, data, trainer = config.actor_rollout_ref.rollout, config.data, config.trainer
    training = 0 if trainer.val_only else data.train_batch_size * rollout.n
    validation = (data.val_batch_size or 0) * rollout.val_kwargs.n
    return min(rollout.max_num_seqs, math.ceil((max(training, validation) or _UNKNOWN_BATCH) / engines))


def capture_sizes(largest: int) -> list[int]:
    """Batch sizes to capture CUDA graphs for: a handful, each about half as large again, `largest` among them.

    Every size costs a second of start-up; a batch between two sizes runs in the larger one.
    """
    sizes, size = [n for n in (1, 2, 4) if n < largest], 8
    while size < largest:
        sizes.append(size)
        size = max(size + 8, size * 3 // 2 // 8 * 8)
    return [*sizes, largest]


def largest_image(spec: ImageSpec, max_prompt_length: int) -> int:
    """Pixels of the largest image that a prompt has room for: what the engine keeps memory for."""
    return min(spec.max_pixels, max_prompt_length * spec.factor**2)


def ban(banned: Sequence[int], vocabulary: int) -> dict[str, Any]:
    """Request parameters under which no id of `banned` is drawn. Raises ValueError when vLLM cannot express it."""
    if not banned:
        return {}
    if len(banned) <= MAX_LISTED_IDS:
        return {"logit_bias": dict.fromkeys(banned, _BAN)}
    allowed = sorted(set(range(vocabulary)) - set(banned))
    if len(allowed) <= MAX_LISTED_IDS:
        return {"allowed_token_ids": allowed}
    raise ValueError(
        f"{len(banned)} of {vocabulary} ids may not be drawn (vision tokens, ids that the tokenizer does not name), "
        f"and vLLM bans at most {MAX_LISTED_IDS} a request: give the tokenizer names for the spare ids, or set "
        "actor_rollout_ref.rollout.name=hf"
    )


def request_parameters(sampling: Sampling, *, limit: int, seed: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of vLLM's `SamplingParams` for one answer of at most `limit` tokens."""
    parameters: dict[str, Any] = {
        "max_tokens": limit,
        "logprobs": 0,  # of the drawn token alone
        "detokenize": False,
        "ignore_eos": True,  # stops are ours: by id only
        "stop_token_ids": [] if sampling.ignore_eos else list(stop_ids),
    }
    if sampling.greedy:
        return parameters | {"temperature": 0.0}
    return parameters | {
        "temperature": sampling.temperature,
        "top_k": max(sampling.top_k, 0),
        "top_p": sampling.top_p,
        "seed": seed,
    }


def answer_seed(seed: int, step: int, uid: str, answer: int) -> int:
    """Seed of one answer, in [0, 2**63)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{uid}/{answer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def image_spans(
    token_ids: TokenIds, grids: Sequence[tuple[int, int, int]], *, image_token_id: int, merge_size: int
) -> list[tuple[int, int]]:
    """(offset, length) of each image's placeholders in the prompt, in order.

    Raises AssertionError where placeholders and grids disagree.
    """
    places = np.flatnonzero(token_ids == image_token_id)
    lengths = [math.prod(grid) // merge_size**2 for grid in grids]
    assert len(places) == sum(lengths), f"{len(places)} image placeholders, images of {lengths} tokens"
    spans, used = [], 0
    for length in lengths:
        first, last = int(places[used]), int(places[used + length - 1])
        assert last - first + 1 == length, f"placeholders {first}..{last} are not the {length} of one image"
        spans.append((first, length))
        used += length
    return spans
