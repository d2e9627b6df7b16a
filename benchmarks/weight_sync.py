"""Weights from an actor process to a rollout process: both on one GPU through CUDA IPC, or on two through NCCL.

    python3 benchmarks/weight_sync.py                                        # 3B shape, one GPU
    python3 benchmarks/weight_sync.py --transport broadcast                  # 3B shape, two GPUs
    python3 benchmarks/weight_sync.py --model-size tiny --device cpu            # the same code on a CPU

The actor holds fp32 weights and casts while it fills the buckets; the rollout copies each tensor into its own bf16
weights, as an engine does that keeps the library's layout. (vLLM's loader is slower than these copies: the whole-step
benchmark has its `timing_s/update_weights`.) Times are the driver's, first call to last answer. After the last transfer
both sides sum the bits of every weight that they hold, and the sums must agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import rows
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from workload import WORKLOADS, model_config, stand_in_tokenizer

from verl.single_controller.cluster import Resources, reserve, start_ray
from verl.single_controller.group import WorkerGroup
from verl.workers.rollout.base import RolloutEngine
from verl.workers.runtime import compute_dtype, resolve_device
from verl.workers.weight_sync.receiver import WeightReceiver
from verl.workers.weight_sync.sender import WeightSender
from verl.workers.weight_sync.sync import WeightSync

Shapes = Mapping[str, Sequence[int]]


def shapes_of(model_size: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a workload's model, a tied head once."""
    shape = WORKLOADS[model_size].model
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(model_config(shape, stand_in_tokenizer(shape.size.max_vocabulary)))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def bits(weights: Iterable[Tensor], dtype: torch.dtype) -> list[int]:
    """The sum of the bits of every weight in `dtype`."""
    word = torch.int16 if dtype.itemsize == 2 else torch.int32
    return [int(weight.to(dtype).view(word).sum(dtype=torch.int64)) for weight in weights]


class Actor:
    """Random fp32 weights and the sender's end."""

    def __init__(self, shapes: Shapes, device: str, bucket: int) -> None:
        torch.manual_seed(0)
        self.dtype = compute_dtype("bfloat16", device)
        self.own = {name: torch.randn(*shape, device=device) for name, shape in shapes.items()}
        self.weights = WeightSender(self.own, dtype=self.dtype, device=torch.device(device), max_bytes=bucket)

    def change(self) -> None:
        for weight in self.own.values():
            weight.mul_(1.01)

    def bits(self) -> list[int]:
        return bits(self.own.values(), self.dtype)


class CopyEngine(RolloutEngine):
    """Weights of its own, overwritten by name."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: str) -> None:
        self.own = {name: torch.zeros(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def begin_update(self) -> None:
        """Nothing to prepare."""

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            self.own[name].copy_(value)

    def end_update(self) -> None:
        """Nothing to forget."""


class Rollout:
    """An engine and the receiver's end."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        self.dtype = compute_dtype("bfloat16", device)
        self.engine = CopyEngine(shapes, self.dtype, device)
        self.weights = WeightReceiver(self.engine, shapes, torch.device(device))

    def bits(self) -> list[int]:
        return bits(self.engine.own.values(), self.dtype)


def start(args: argparse.Namespace, shapes: Shapes, device: str) -> tuple[WorkerGroup, WorkerGroup]:
    """One actor and one rollout, on the same bundle (`mapped`) or each on its own."""
    start_ray()
    colocated = args.transport == "mapped"
    first = reserve(Resources(1, 1, device), 300)
    second = first if colocated else reserve(Resources(1, 1, device), 300)
    share = (0.5 if colocated else 1.0) if device == "cuda" else 0.0
    options = {"size": 1, "gpus": share, "threads": 1, "timeout": 600.0}
    actors = WorkerGroup("actor", bundles=first, **options)
    rollouts = WorkerGroup("rollout", bundles=second, **options)
    actors.build(Actor, [(shapes, device, args.bucket_megabytes << 20)])
    rollouts.build(Rollout, [(shapes, device)])
    return actors, rollouts


def measure(args: argparse.Namespace, actors: WorkerGroup, rollouts: WorkerGroup) -> list[rows.BenchmarkRow]:
    begin = time.perf_counter()
    sync = WeightSync(actors, rollouts, args.transport)
    connect = time.perf_counter() - begin
    seconds = []
    for _ in range(1 + args.repeats):
        actors.all("change")
        begin = time.perf_counter()
        synced = sync(with_checksum=False)
        seconds.append(time.perf_counter() - begin)
    actors.all("change")
    begin = time.perf_counter()
    sync(with_checksum=True)
    checked = time.perf_counter() - begin
    (sent,), (held,) = actors.all("bits"), rollouts.all("bits")
    assert sent == held, f"{sum(a != b for a, b in zip(sent, held, strict=True))} weights differ at their two ends"
    steady, count = seconds[1:], len(sync.plan.buckets)
    how = (
        f"{args.transport}, {synced.nbytes / 1e9:.2f} GB in {count} buckets of {args.bucket_megabytes} MB, bits of "
        f"{len(sent)} weights equal at both ends"
    )
    median = statistics.median(steady)
    spread = f"median of {len(steady)} ({min(steady):.3f}-{max(steady):.3f} s), {synced.nbytes / median / 1e9:.0f} GB/s"

    def row(name: str, value: float, unit: str, mode: str) -> rows.BenchmarkRow:
        workload, parameters = WORKLOADS[args.model_size].name, sum(s.size for b in sync.plan.buckets for s in b.slots)
        return rows.BenchmarkRow(row=name, workload=workload, value=value, unit=unit, parameters=parameters, mode=mode)

    return [
        row("weight_sync_s", median, "s", f"{how}; {spread}"),
        row("weight_sync_first_s", seconds[0], "s", f"{args.transport}, the first transfer"),
        row("weight_sync_checked_s", checked, "s", f"{args.transport}, with checksums of every bucket at both ends"),
        row("weight_sync_connect_s", connect, "s", f"{args.transport}, once a run: names checked, memory mapped"),
        row("weight_sync_bytes", float(synced.nbytes), "bytes", args.transport),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=WORKLOADS, default="3b")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--transport", choices=("mapped", "broadcast"), default="mapped")
    parser.add_argument("--bucket-megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the result file")
    args = parser.parse_args()
    actors, rollouts = start(args, shapes_of(args.model_size), resolve_device(args.device))
    try:
        found = measure(args, actors, rollouts)
    finally:
        actors.kill()
        rollouts.kill()
    rows.write("weight_sync" if args.transport == "mapped" else "weight_sync_broadcast", found, folder=args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
