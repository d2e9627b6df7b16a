"""What `rollout.engine_kwargs.vllm` may not hold: the program's own arguments, and those that have a key.

Invariant: an argument has one place. The memory plan, and whoever reads config.yaml, look at the keys alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from verl.config.nodes import RolloutConfig

RESERVED = frozenset({
    "model", "tokenizer", "skip_tokenizer_init", "generation_config", "logprobs_mode", "distributed_executor_backend",
    "hf_overrides", "trust_remote_code", "mm_processor_cache_gb",
})  # fmt: skip
"""Arguments that belong to the program: another value would change what an answer or its log-probs mean."""

OWN_KEY = {
    "cudagraph_capture_sizes": "cudagraph_capture_sizes",
    "disable_log_stats": "disable_log_stats",
    "dtype": "dtype",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "enable_sleep_mode": "free_cache_engine",
    "enforce_eager": "enforce_eager",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "load_format": "load_format",
    "max_model_len": "max_model_len",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_num_seqs": "max_num_seqs",
    "seed": "seed",
    "tensor_parallel_size": "tensor_model_parallel_size",
}
"""vLLM's argument -> the rollout key that sets it."""

CACHE_BYTES = "kv_cache_memory_bytes"
"""The argument that says how large vLLM's cache is, in place of a share of the GPU; the memory plan counts it."""


def given_cache(rollout: RolloutConfig) -> int | None:
    """Bytes of vLLM's cache where the user gives them, else None: `gpu_memory_utilization` decides."""
    value = rollout.engine_kwargs.vllm.get(CACHE_BYTES)
    return None if value is None else int(value)


def engine_kwargs_problems(node: str, rollout: RolloutConfig) -> Iterator[str]:
    """One line for each argument that may not stand there; `node` is the rollout's own key."""
    if rollout.name != "vllm":
        return
    for name, value in sorted(rollout.engine_kwargs.vllm.items()):
        key = f"{node}.engine_kwargs.vllm.{name}={value}"
        if name in RESERVED:
            yield f"{key} is set by the program: remove it"
        elif name in OWN_KEY:
            yield f"{key} has a key of its own: set {node}.{OWN_KEY[name]} instead"
        elif name == CACHE_BYTES and value is not None and (type(value) is not int or value <= 0):
            yield f"{key} must be a whole number of bytes above 0, or null"
