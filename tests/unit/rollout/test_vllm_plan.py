"""Invariants of what vLLM is asked for. No vLLM is imported here."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verl.config import PPOConfig, load
from verl.utils.dataset.images import ImageSpec
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.vllm_plan import (
    MAX_LISTED_IDS,
    answer_seed,
    ban,
    capture_sizes,
    decoded_together,
    engine_arguments,
    image_spans,
    largest_image,
    request_parameters,
)

ROLLOUT = "actor_rollout_ref.rollout"
SAMPLING = Sampling(
    n=3, temperature=0.7, top_k=-1, top_p=0.9, do_sample=True, max_tokens=24, max_context=512, ignore_eos=False, seed=7
)


def config(*overrides: str) -> PPOConfig:
    fixed = [f"{ROLLOUT}.name=vllm", "data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=32"]
    sizes = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4"]
    return load("ppo_trainer", [*fixed, *sizes, f"{ROLLOUT}.n=5", "trainer.n_gpus_per_node=1", *overrides])


def arguments(*overrides: str, device: str = "cuda", engines: int = 1, waits: bool = True) -> dict[str, Any]:
    return engine_arguments(
        config(*overrides),
        folder=Path("model"),
        spec=ImageSpec(),
        device=device,
        engines=engines,
        waits_for_weights=waits,
    )


@pytest.mark.parametrize(
    ("key", "value", "name", "expected"),
    [
        ("gpu_memory_utilization", "0.3", "gpu_memory_utilization", 0.3),
        ("enforce_eager", "False", "enforce_eager", False),
        ("enable_chunked_prefill", "False", "enable_chunked_prefill", False),
        ("free_cache_engine", "False", "enable_sleep_mode", False),
        ("load_format", "auto", "load_format", "auto"),
        ("max_num_seqs", "17", "max_num_seqs", 17),
        ("max_num_batched_tokens", "2048", "max_num_batched_tokens", 2048),
        ("disable_log_stats", "False", "disable_log_stats", False),
        ("max_model_len", "2000", "max_model_len", 2000),
        ("dtype", "float16", "dtype", "float16"),
        ("tensor_model_parallel_size", "2", "tensor_parallel_size", 2),
        ("seed", "11", "seed", 11),
        ("engine_kwargs.vllm", "{block_size:32}", "block_size", 32),
    ],
)
def test_every_key_of_the_yaml_reaches_the_engines_arguments(key: str, value: str, name: str, expected: Any) -> None:
    gpus = ("trainer.n_gpus_per_node=2",) if key.startswith("tensor") else ()
    before, after = arguments(*gpus).get(name), arguments(f"{ROLLOUT}.{key}={value}", *gpus)[name]
    assert (before != after, after) == (True, expected), (before, after)


def test_given_capture_sizes_are_taken_and_none_are_captured_when_eager() -> None:
    graphs = f"{ROLLOUT}.enforce_eager=False"
    assert arguments(graphs, f"{ROLLOUT}.cudagraph_capture_sizes=[3,5]")["cudagraph_capture_sizes"] == [3, 5]
    assert arguments(graphs)["cudagraph_capture_sizes"] == capture_sizes(320)
    assert "cudagraph_capture_sizes" not in arguments()


def test_on_cpu_the_engine_is_fp32_eager_reads_its_weights_and_is_one_process() -> None:
    found = arguments(f"{ROLLOUT}.enforce_eager=False", device="cpu")
    assert (found["dtype"], found["enforce_eager"], found["load_format"]) == ("float32", True, "auto")
    assert {"gpu_memory_utilization", "enable_sleep_mode", "cudagraph_capture_sizes"} & found.keys() == set()
    assert found["tensor_parallel_size"] == 1 and "distributed_executor_backend" not in found
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size=2 cuts the model over GPUs"):
        config(f"{ROLLOUT}.tensor_model_parallel_size=2", "trainer.n_gpus_per_node=2", "trainer.device=cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_ranks_of_one_engine_schedule_alike_and_map_no_peer(device: str) -> None:
    two = (f"{ROLLOUT}.tensor_model_parallel_size=2", "trainer.n_gpus_per_node=2")
    found = arguments(*two, device=device)
    assert (found["tensor_parallel_size"], found["distributed_executor_backend"]) == (2, "external_launcher")
    assert found["async_scheduling"] is False and found["disable_custom_all_reduce"] is True
    fused = {"pass_config": {"fuse_allreduce_rms": False}} if device == "cuda" else None
    assert found.get("compilation_config") == fused
    assert "async_scheduling" not in arguments(device=device), "one rank alone may look ahead"
    mine = f"+{ROLLOUT}.engine_kwargs.vllm.async_scheduling=True"
    assert arguments(mine, device=device)["async_scheduling"] is True
    with pytest.raises(ValueError, match=r"engine_kwargs\.vllm\.async_scheduling=True is set by the program"):
        arguments(mine, *two, device=device)


def test_an_engine_that_nobody_sends_weights_reads_them() -> None:
    assert arguments()["load_format"] == "dummy"
    assert arguments(waits=False)["load_format"] == "auto"


@pytest.mark.parametrize("largest", [1, 2, 7, 8, 9, 64, 320, 1024])
def test_the_largest_batch_is_captured_and_no_size_is_far_above_the_one_below(largest: int) -> None:
    sizes = capture_sizes(largest)
    assert sizes[-1] == largest and sizes == sorted(set(sizes)) and sizes[0] >= 1, sizes
    assert len(sizes) <= 16, sizes
    far = [(a, b) for a, b in itertools.pairwise(sizes) if b > 2 * a]
    assert far == [], sizes


def test_the_graphs_of_an_engine_cover_its_share_of_a_step() -> None:
    assert decoded_together(config(), engines=1) == 320
    assert decoded_together(config(), engines=3) == 107
    assert decoded_together(config(f"{ROLLOUT}.max_num_seqs=100"), engines=1) == 100
    many = ("data.val_batch_size=500", f"{ROLLOUT}.val_kwargs.n=2")
    assert decoded_together(config(*many), engines=2) == 500


def test_a_prompts_room_bounds_the_largest_image() -> None:
    assert largest_image(ImageSpec(max_pixels=10**6), 168) == 168 * 28 * 28
    assert largest_image(ImageSpec(max_pixels=10**5), 168) == 10**5


def test_banned_ids_are_listed_either_way_or_refused() -> None:
    assert ban([], 10) == {}
    assert ban([3, 5], 10) == {"logit_bias": {3: -100.0, 5: -100.0}}
    few = ban(range(10, 3000), 3000)
    assert few == {"allowed_token_ids": list(range(10))}
    assert list(ban(range(MAX_LISTED_IDS), 9000)) == ["logit_bias"]
    with pytest.raises(ValueError, match=r"1025 of 9000 ids may not be drawn.*at most 1024.*rollout.name=hf"):
        ban(range(MAX_LISTED_IDS + 1), 9000)


def test_a_request_stops_by_id_only_and_reports_the_drawn_tokens_log_prob() -> None:
    found = request_parameters(SAMPLING, limit=9, seed=4, stop_ids=(1, 2))
    assert found["max_tokens"] == 9 and found["logprobs"] == 0 and found["detokenize"] is False
    assert (found["ignore_eos"], found["stop_token_ids"]) == (True, [1, 2])
    assert (found["temperature"], found["top_k"], found["top_p"], found["seed"]) == (0.7, 0, 0.9, 4)
    endless = request_parameters(dataclasses.replace(SAMPLING, ignore_eos=True), limit=9, seed=4, stop_ids=(1, 2))
    assert endless["stop_token_ids"] == []


@pytest.mark.parametrize("change", [{"do_sample": False}, {"temperature": 0.0}])
def test_greedy_requests_have_no_seed_and_no_filter(change: dict[str, Any]) -> None:
    found = request_parameters(dataclasses.replace(SAMPLING, **change), limit=9, seed=4, stop_ids=())
    assert found["temperature"] == 0.0 and {"seed", "top_p", "top_k"} & found.keys() == set()


def test_seeds_differ_by_run_step_prompt_and_answer_and_fit_the_engine() -> None:
    names = [(s, step, uid, i) for s in (1, 2) for step in (0, 1) for uid in ("a", "b") for i in range(5)]
    seeds = [answer_seed(*name) for name in names]
    assert seeds == [answer_seed(*name) for name in names]
    assert len(set(seeds)) == len(names) and min(seeds) >= 0 and max(seeds) < 2**63
    # torch's CPU generator keeps the low 32 bits of a seed.
    assert len({seed % 2**32 for seed in seeds}) == len(names)


def test_spans_follow_the_grids_and_a_mismatch_names_both_sides() -> None:
    ids = np.array([1, 9, 9, 9, 9, 2, 9, 3], np.int32)
    grids = [(1, 4, 4), (1, 2, 2)]
    assert image_spans(ids, grids, image_token_id=9, merge_size=2) == [(1, 4), (6, 1)]
    with pytest.raises(AssertionError, match=r"5 image placeholders, images of \[4, 4\] tokens"):
        image_spans(ids, [(1, 4, 4), (1, 4, 4)], image_token_id=9, merge_size=2)
    with pytest.raises(AssertionError, match=r"placeholders 4..6 are not the 2 of one image"):
        image_spans(ids, [(1, 2, 6), (1, 2, 4)], image_token_id=9, merge_size=2)
