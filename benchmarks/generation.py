"""Answers per second of the vLLM engine on the `CTU-3B` workload, in one process without Ray.

    python3 benchmarks/generation.py                                  # one GPU
    python3 benchmarks/generation.py --model-size tiny --device cpu   # the same code on vLLM for CPU

Rows: `engine_start_s` (CUDA graphs included, the compile cache as it is), `generate_tokens_per_s` (response tokens
only) as the trainer asks for answers, the same through vLLM's output processor, there without log-probs and with
detokenising, and the canary: the distance of the engine's log-probs to those of the packed forward, beside what bf16
does to the plain model. Prefix and image caches are dropped before every repeat; the warm-up call is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import rows
import torch
from measure import synchronize
from transformers import AutoTokenizer
from workload import WORKLOADS, Workload, ctu_3b_model, ctu_3b_prompts

from verl.config import load
from verl.models.policy import banned_ids, load_policy, make_inputs
from verl.packing.layout import pack
from verl.protocol import Prompt, Response, TrainGroup, TrainSample
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import PatchSource
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.canary import Apart, plain_log_probs
from verl.workers.rollout.vllm_engine import VLLMEngine, model_facts
from verl.workers.rollout.vllm_plan import answer_seed, engine_arguments, request_parameters
from verl.workers.runtime import resolve_device

ROLLOUT = "actor_rollout_ref.rollout"


def build(folder: Path, workload: Workload, patches: PatchSource, device: str, extra: Sequence[str]) -> VLLMEngine:
    """An engine as the trainer makes it, reading its weights from the folder."""
    overrides = [
        f"{ROLLOUT}.name=vllm",
        f"{ROLLOUT}.n={workload.n}",
        f"{ROLLOUT}.enforce_eager=False",
        f"{ROLLOUT}.gpu_memory_utilization=0.6",
        f"{ROLLOUT}.free_cache_engine=False",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={workload.prompts}",
        f"data.train_batch_size={workload.prompts}",
        f"data.max_prompt_length={workload.prompt_tokens}",
        f"data.max_response_length={workload.answer_tokens}",
        "trainer.n_gpus_per_node=1",
        f"trainer.device={device}",
        *extra,
    ]
    spec = ImageSpec.from_pretrained(folder)
    arguments = engine_arguments(
        load("ppo_trainer", overrides), folder=folder, spec=spec, device=device, engines=1, waits_for_weights=False
    )
    print(f"engine arguments: {arguments}", flush=True)
    return VLLMEngine(arguments, patches, model_facts(folder, AutoTokenizer.from_pretrained(folder)), device=device)


def sampling_of(workload: Workload) -> Sampling:
    return Sampling(
        n=workload.n,
        temperature=1.0,
        top_k=-1,
        top_p=1.0,
        do_sample=True,
        max_tokens=workload.answer_tokens,
        max_context=workload.prompt_tokens + workload.answer_tokens,
        ignore_eos=True,
        seed=1,
    )


def answer_with(engine: VLLMEngine, prompts: Sequence[Prompt], sampling: Sampling, changes: dict[str, Any]) -> int:
    """Response tokens of the same requests with other parameters, through vLLM's own front door."""
    from vllm.sampling_params import RequestOutputKind

    tokens, vllm = 0, engine.engine
    changes = {"output_kind": RequestOutputKind.FINAL_ONLY, "flat_logprobs": True} | changes
    for place, prompt in enumerate(prompts):
        content = engine.input_of(prompt)
        for answer in range(sampling.n):
            seed = answer_seed(sampling.seed, 0, prompt.uid, answer)
            asked = request_parameters(sampling, limit=sampling.max_tokens, seed=seed, stop_ids=())
            vllm.add_request(f"{place}.{answer}", content, engine.parameters(asked | changes))
    while vllm.has_unfinished_requests():
        tokens += sum(len(output.outputs[0].token_ids) for output in vllm.step())
    return tokens


def timed(engine: VLLMEngine, run: Callable[[], int], repeats: int) -> tuple[list[float], int]:
    """Seconds of `repeats` calls after a warm-up, caches dropped before each, and the tokens of one."""
    seconds: list[float] = []
    tokens = 0
    for _ in range(repeats + 1):
        engine.drop_caches()
        synchronize()
        begin = time.perf_counter()
        tokens = run()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:], tokens


def canary(
    folder: Path, prompt: Prompt, answer: Response, patches: PatchSource, device: str
) -> tuple[Apart, Apart | None]:
    """Engine to packed forward, and plain bf16 to plain fp32 (None on a CPU, where all is fp32)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    policy = load_policy(folder, tokenizer, dtype=dtype).to(device)
    sample = TrainSample(0, answer.token_ids, np.ones(len(answer.token_ids), np.float32))
    config = policy.config
    merge = config.vision_config.spatial_merge_size
    batch = pack([TrainGroup(prompt, (sample,))], image_token_id=config.image_token_id, merge_size=merge)
    inputs = make_inputs(batch, patches(batch.image_keys), patches.dim, torch.device(device))
    with torch.inference_mode():
        packed = policy(inputs, temperature=1.0).log_probs.float().cpu().numpy()
    banned = banned_ids(folder, tokenizer, config.text_config.vocab_size)
    del policy
    apart = Apart.of(answer.log_probs, packed)
    if device == "cpu":
        return apart, None

    def plain(kind: torch.dtype) -> np.ndarray:
        return plain_log_probs(
            folder, prompt, answer.token_ids, patches, banned=banned, temperature=1.0, dtype=kind, device=device
        )

    return apart, Apart.of(plain(torch.bfloat16), plain(torch.float32))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Benchmark of generation.")
    parser.add_argument("--model-size", choices=sorted(WORKLOADS), default="3b")
    parser.add_argument("--model", type=Path, help="folder of the model (made when absent); default: a temporary one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--append", action="store_true", help="keep the rows of the result file")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of generation.json")
    parser.add_argument("overrides", nargs="*", help="keys of ppo_trainer.yaml, e.g. of the rollout node")
    args = parser.parse_args(argv)
    workload, device = WORKLOADS[args.model_size], resolve_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = ctu_3b_model(args.model or Path(scratch) / "model", workload)
        write = partial(rows.write, "generation", folder=args.results, append=args.append)
        measure(folder, workload, device, args.repeats, args.overrides, write)


def measure(
    folder: Path, workload: Workload, device: str, repeats: int, extra: Sequence[str], write: Callable[..., None]
) -> None:
    """All rows; `write` gets those so far after each, so that a run that is cut short leaves what it measured."""
    prompts, patches = ctu_3b_prompts(None, workload, device=device)
    sampling = sampling_of(workload)
    begin = time.perf_counter()
    engine = build(folder, workload, patches, device, extra)
    start = time.perf_counter() - begin
    found: list[Any] = []

    def row(name: str, value: float, unit: str, mode: str, base: str = "") -> None:
        ratio = {"ratio": value / next(r.value for r in found if r.row == base), "ratio_to": base} if base else {}
        found.append(
            rows.BenchmarkRow(
                row=name, workload=workload.name, value=value, unit=unit, samples=workload.samples, mode=mode, **ratio
            )
        )
        write(found, show=False)

    row("engine_start_s", start, "s", "weights read from disk")
    answers: list[list[Response]] = []

    def as_the_trainer() -> int:
        answers[:] = engine.generate(prompts, sampling, step=0)
        return sum(len(r.token_ids) for group in answers for r in group)

    def other(**changes: Any) -> Callable[[], int]:
        return lambda: answer_with(engine, prompts, sampling, changes)

    ours, theirs = "generate_tokens_per_s", "generate_tokens_per_s_output_processor"
    for name, base, run in (
        (ours, "", as_the_trainer),
        (theirs, ours, other()),
        (f"{ours}_no_logprobs", theirs, other(logprobs=None)),
        (f"{ours}_detokenized", theirs, other(detokenize=True)),
    ):
        seconds, tokens = timed(engine, run, repeats)
        spread = f"{tokens:,} tokens in {median(seconds):.2f} s, {min(seconds):.2f}-{max(seconds):.2f} s"
        row(name, tokens / median(seconds), "response tokens/s", f"median of {repeats}, {spread}{memory(device)}", base)
    apart, yardstick = canary(folder, prompts[0], answers[0][0], patches, device)
    beside = "" if yardstick is None else f"; plain bf16 to plain fp32: {yardstick}"
    length = len(answers[0][0].token_ids)
    row("canary_max_logprob_diff", apart.worst, "nats", f"engine to packed, {length} tokens: {apart}{beside}")
    write(found)


def memory(device: str) -> str:
    """Memory in use on the whole GPU; the engine takes its share at the start and keeps it."""
    if device == "cpu":
        return ""
    free, total = torch.cuda.mem_get_info()
    return f", {(total - free) / 2**30:.1f} GiB of the GPU in use"


if __name__ == "__main__":
    main()
