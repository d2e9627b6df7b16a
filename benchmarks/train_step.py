"""The training half of a step on one device, without Ray: padded, packed and shared-prefix passes, reference, update.

    python3 benchmarks/train_step.py                                   # CTU-3B on one GPU
    python3 benchmarks/train_step.py --model-size tiny --seconds 60    # the same code on a CPU

Rows (`--rows` picks some, in this order): forward and backward of one mini-batch (`padded_ckpt`, `padded`: plain
transformers, 5 samples a micro-batch, full logits, the judge of tests/padded_reference.py; `packed`: every answer with
its own prompt; `shared`: prompts shared), `reference` log-probs and the `update` of the whole step with fp32 master
weights and AdamW, and `parity`, the distance of each path to the padded one in fp32. What does not fit in memory is a
row that says so. `--rows ablation` takes one part of the fast path away (or one option in) at a time. Results are
written after every row.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import rows
import torch
from ablation import SWITCHES, Switch
from measure import Deadline, Missed, Timing, attempt, largest_that_fits, once, profiled, release, timed
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from workload import WORKLOADS, Workload, ctu_3b_groups, ctu_3b_model, ctu_3b_prompts

sys.path.insert(0, str(rows.ROOT / "tests"))
from padded_reference import PaddedReference

from verl.models.log_probs import TokenStats
from verl.models.policy import Policy, banned_ids, load_policy
from verl.packing.columns import columns
from verl.protocol import TrainGroup
from verl.utils.dataset.patches import PatchSource
from verl.utils.flops import FlopCounter, peak_flops
from verl.workers.actor.engine import PackedRunner, ShardSpec, TrainEngine, shard
from verl.workers.actor.objective import PolicyObjective
from verl.workers.actor.optim import OptimSpec
from verl.workers.runtime import build_mesh, compute_dtype, resolve_device, start_process_group_from_env

OBJECTIVE = PolicyObjective(
    loss_mode="vanilla",
    clip_low=0.2,
    clip_high=0.2,
    clip_dual=3.0,
    kl_coef=0.01,
    kl_kind="low_var_kl",
    entropy_coef=0.0,
)
SPEC = OptimSpec(
    lr=1e-6,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    clip_grad=1.0,
    warmup_steps=0,
    total_steps=1000,
    style="constant",
    min_lr_ratio=0.0,
)
_PADDED_SAMPLES = 5  # a padded micro-batch: what a plain trainer of this model fits on a card
_ACTIVATIONS_GIB = 7.5  # estimate for one group of CTU-3B without checkpointing, in bf16

Cut = list[list[TrainGroup]]


def singles(groups: Sequence[TrainGroup]) -> list[TrainGroup]:
    """Every answer with its own copy of the prompt."""
    return [replace(g, samples=(s,)) for g in groups for s in g.samples]


def cut(groups: Sequence[TrainGroup], size: int) -> Cut:
    return [list(groups[i : i + size]) for i in range(0, len(groups), size)]


def powers_of_two(limit: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= limit]


@dataclass
class Bench:
    """What all rows share: data, device, results so far."""

    workload: Workload
    folder: Path
    device: str
    deadline: Deadline
    results: Path
    patches: PatchSource
    minis: list[list[TrainGroup]]
    """Mini-batches of a step; the first defines its old log-probs itself."""
    ablation_groups: int = 8
    switches: Sequence[str] = ()
    """Of the ablation; none: all."""
    profile: bool = False
    """Write `profile_<row>.txt` beside the results: where the time of one more pass goes."""
    append: bool = False
    """Keep the rows that the result file has, but for those that this run measures again."""
    found: list[rows.BenchmarkRow] = field(default_factory=list)
    """Rows of this run."""

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        config = AutoConfig.from_pretrained(self.folder)
        self.flops = FlopCounter(config)
        self.banned = banned_ids(self.folder, self.tokenizer, config.text_config.vocab_size)
        self.half = compute_dtype("bf16", self.device)
        with torch.device("meta"):
            self.parameters = sum(p.numel() for p in Qwen2_5_VLForConditionalGeneration(config).parameters())
        self.peak = peak_flops(torch.cuda.get_device_name()) if self.device == "cuda" else None
        keys = {key for mini in self.minis for g in mini for key in g.prompt.image_keys}
        self.images: dict[str, Tensor] = {key: self.patches([key]) for key in sorted(keys)}

    def policy(self, dtype: torch.dtype, *, checkpointing: bool) -> Policy:
        """As the actor makes it, on the CPU."""
        compiled = self.device == "cuda"
        return load_policy(self.folder, self.tokenizer, dtype=dtype, checkpointing=checkpointing, compiled=compiled)

    @property
    def groups(self) -> list[TrainGroup]:
        return [g for mini in self.minis for g in mini]

    def add(self, row: str, value: float | None, unit: str, mode: str, *, samples: int, ratio_to: str = "") -> None:
        """Keep a row, and write all of them: a later one may end the process."""
        base = next((r.value for r in reversed(self.found) if r.row == ratio_to and r.value), None)
        self.found.append(
            rows.BenchmarkRow(
                row=row,
                workload=self.workload.name,
                value=value,
                unit=unit,
                mode=mode,
                samples=samples,
                parameters=self.parameters,
                ratio=value / base if base and value is not None else None,
                ratio_to=ratio_to if base and value is not None else None,
            )
        )
        self.write(show=False)
        shown = "none" if value is None else f"{value:.4g} {unit}"
        print(f"{row}: {shown} ({mode})", flush=True)

    def write(self, *, show: bool) -> None:
        rows.write("train_step", self.found, folder=self.results, show=show, append=self.append)

    def add_timing(
        self, row: str, result: Timing | Missed, how: str, groups: Sequence[TrainGroup], *, passes: int, shared: bool
    ) -> None:
        """A row of seconds with tokens/s, MFU and memory in its mode. `passes` is 3 with a backward, else 1."""
        samples = sum(len(g.samples) for g in groups)
        ratio_to = "train_padded_ckpt_s" if row.startswith("train_") and row != "train_padded_ckpt_s" else ""
        if row.startswith("ablation_") and row != "ablation_base_s":
            ratio_to = "ablation_base_s"
        if isinstance(result, Missed):
            self.add(row, None, "s", f"{how}: {result.reason}", samples=samples)
            return
        tokens = logical_tokens(groups)
        mode = f"{how}; {result}; {tokens / result.median:.0f} tokens/s"
        logical = computed = None
        if self.peak is not None:
            logical = passes * 2 * self.flops.text_parameters * tokens / result.median / self.peak
            computed = passes * self.flops.forward(groups, shared=shared) / result.median / self.peak
            mode += f"; MFU {logical:.1%} logical, {computed:.1%} computed"
        self.add(row, result.median, "s", mode, samples=samples, ratio_to=ratio_to)
        if row in ("train_shared_s", "update_s") and logical is not None and computed is not None:
            name = row.removesuffix("_s")
            for kind, value in (("logical", logical), ("computed", computed)):
                self.add(f"{name}_mfu_{kind}", value, "of the peak", f"of {row}", samples=samples)
            self.add(f"{name}_peak_gpu_gib", result.peak_gib, "GiB", f"of {row}", samples=samples)


def logical_tokens(groups: Sequence[TrainGroup]) -> int:
    return sum(len(g.prompt.token_ids) + len(s.token_ids) for g in groups for s in g.samples)


def response_tokens(groups: Sequence[TrainGroup]) -> int:
    return sum(len(s.token_ids) for g in groups for s in g.samples)


class Padded:
    """Plain transformers: weights and gradients in `dtype`, full logits."""

    def __init__(self, bench: Bench, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        self.images = bench.images
        self.judge = PaddedReference(
            bench.folder,
            bench.banned,
            dtype=dtype,
            attention="sdpa",
            device=bench.device,
            checkpointing=checkpointing,
        )
        self.model = self.judge.model

    def pass_over(self, micro_batches: Cut) -> list[Tensor]:
        """Forward and backward; the gradient stays in `model`. Returns the log-probs of each micro-batch."""
        self.model.zero_grad(set_to_none=True)
        share, found = 1.0 / sum(map(response_tokens, micro_batches)), []
        for groups in micro_batches:
            log_probs, _ = self.judge(groups, self.images, 1.0, with_entropy=False)
            loss, _ = OBJECTIVE(TokenStats(log_probs, torch.zeros_like(log_probs)), columns(groups), share)
            loss.backward()
            found.append(log_probs.detach())
        return found


class Packed:
    """The packed forward: weights and gradients in `dtype`, no FSDP."""

    def __init__(self, bench: Bench, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        policy = bench.policy(dtype, checkpointing=checkpointing)
        self.policy = policy.to(bench.device)
        self.model = policy.hf
        self.runner = PackedRunner(policy, bench.patches, torch.device(bench.device), 1.0)

    def pass_over(self, micro_batches: Cut) -> list[Tensor]:
        """As `Padded.pass_over`."""
        self.model.zero_grad(set_to_none=True)
        share, found = 1.0 / sum(map(response_tokens, micro_batches)), []
        for micro in self.runner.micro_batches(micro_batches, trained=True):
            stats = self.policy(micro.inputs, temperature=1.0)
            loss, _ = OBJECTIVE(stats, micro.columns, share)
            loss.backward()
            found.append(stats.log_probs.detach())
        return found


def padded(bench: Bench, row: str, *, checkpointing: bool) -> None:
    mini = bench.minis[0]
    micro_batches = cut(singles(mini), _PADDED_SAMPLES)

    def run() -> Timing:
        path = Padded(bench, bench.half, checkpointing=checkpointing)
        return timed(lambda: path.pass_over(micro_batches), bench.deadline)

    how = f"padded, {'' if checkpointing else 'no '}checkpointing, {_PADDED_SAMPLES} samples a micro-batch"
    bench.add_timing(row, attempt(run), how, mini, passes=3, shared=False)


def packed(bench: Bench, row: str, *, shared: bool) -> None:
    mini = bench.minis[0]
    units = mini if shared else singles(mini)
    what = "groups" if shared else "samples"
    for checkpointing in (False, True):
        label = f"{'shared prefix' if shared else 'packed'}, {'' if checkpointing else 'no '}checkpointing"
        path = Packed(bench, bench.half, checkpointing=checkpointing)

        def run(size: int, path: Packed = path) -> float:
            path.pass_over(cut(units, size)[:1])  # memory shows in the first micro-batch, a compilation too
            return once(lambda: path.pass_over(cut(units, size)))

        sizes = powers_of_two(len(units)) if shared else powers_of_two(len(units))[2:]
        tried = largest_that_fits(sizes, run)
        if isinstance(tried, Missed):
            bench.add_timing(row, tried, label, mini, passes=3, shared=shared)
            del path, run
            release()
            continue  # with checkpointing it may fit
        best, seconds = tried
        others = ", ".join(f"{size}: {value:.2f} s" for size, value in seconds.items())
        result = attempt(lambda size=best, path=path: timed(lambda: path.pass_over(cut(units, size)), bench.deadline))
        if bench.profile:
            profiled(
                lambda size=best, path=path: path.pass_over(cut(units, size)), bench.results / f"profile_{row}.txt"
            )
        bench.add_timing(
            row, result, f"{label}, {best} {what} a micro-batch (tried {others})", mini, passes=3, shared=shared
        )
        return


def reference(bench: Bench) -> None:
    path = Packed(bench, bench.half)
    path.policy.requires_grad_(False)
    groups = bench.groups
    sizes = [size for size in powers_of_two(len(groups)) if size >= min(4, len(groups))]
    tried = largest_that_fits(sizes, lambda size: once(lambda: path.runner.log_probs(cut(groups, size))))
    if isinstance(tried, Missed):
        bench.add_timing("reference_s", tried, "shared prefix, no grad", groups, passes=1, shared=True)
        return
    best, seconds = tried
    others = ", ".join(f"{size}: {value:.2f} s" for size, value in seconds.items())
    result = attempt(lambda: timed(lambda: path.runner.log_probs(cut(groups, best)), bench.deadline))
    if bench.profile:
        profiled(lambda: path.runner.log_probs(cut(groups, best)), bench.results / "profile_reference_s.txt")
    how = f"shared prefix, no grad, {best} groups a micro-batch (tried {others})"
    bench.add_timing("reference_s", result, how, groups, passes=1, shared=True)


def update_plans(bench: Bench) -> list[tuple[bool, int]]:
    """(checkpointing, groups a micro-batch), most hopeful first, without those that cannot fit beside the optimizer."""
    most = len(bench.minis[0])
    # one group at a time is slower than recomputing many
    plans = [(False, 8), (False, 4), (False, 2), (True, 16), (True, 8), (False, 1), (True, 2)]
    plans = [(checkpointing, min(size, most)) for checkpointing, size in plans]
    if bench.device == "cuda":
        # fp32 weights, gradients and both averages, and the bf16 copy in use
        held = bench.parameters * (4 * 4 + 2) / 2**30 + 3
        room = torch.cuda.get_device_properties(0).total_memory / 2**30 - held
        plans = [p for p in plans if p[0] or p[1] * _ACTIVATIONS_GIB <= room]
    return list(dict.fromkeys(plans))


def update(bench: Bench) -> None:
    groups, result, how = bench.groups, Missed("no plan fits"), "shared prefix"
    for checkpointing, size in update_plans(bench):

        def run(checkpointing: bool = checkpointing, size: int = size) -> Timing:
            policy = bench.policy(torch.float32, checkpointing=checkpointing)
            spec = ShardSpec(
                param_dtype=bench.half,
                reduce_dtype=torch.float32,
                offload=False,
                reshard_after_forward=checkpointing,
            )
            policy = shard(policy, build_mesh(bench.device, -1), spec)
            engine = TrainEngine(PackedRunner(policy, bench.patches, torch.device(bench.device), 1.0), SPEC)

            def step() -> None:
                for mini in bench.minis:
                    metrics = engine.step(cut(mini, size), OBJECTIVE, response_tokens(mini))
                    assert metrics["skipped"] == 0, f"a step was skipped: {metrics}"

            result = timed(step, bench.deadline)
            if bench.profile:
                profiled(step, bench.results / "profile_update_s.txt")
            return result

        result = attempt(run)
        release()
        how = (
            f"shared prefix, {'' if checkpointing else 'no '}checkpointing, {size} groups a micro-batch, "
            f"{len(bench.minis)} optimizer steps, fp32 master weights and AdamW on the device"
        )
        if isinstance(result, Timing):
            break
        print(f"update_s: {how}: {result.reason}", flush=True)
    bench.add_timing("update_s", result, how, groups, passes=3, shared=True)


Gradients = dict[str, Tensor]


def gradients(path: Padded | Packed) -> Gradients:
    return {name: p.grad.cpu() for name, p in path.model.named_parameters() if p.grad is not None}


def distance(found: Gradients, expected: Gradients, device: str) -> tuple[float, float]:
    """Largest entry of the difference over the largest of its tensor (or 1e-3 of the largest of all), and the sum of
    absolute differences over the sum of absolute entries."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    floor = 1e-3 * max(float(e.abs().max()) for e in expected.values())
    largest = total = scale = 0.0
    for name, want in expected.items():
        want = want.to(device).float()
        difference = (found[name].to(device).float() - want).abs()
        largest = max(largest, float(difference.max()) / max(float(want.abs().max()), floor))
        total, scale = total + float(difference.sum()), scale + float(want.abs().sum())
    return largest, total / scale


def parity(bench: Bench) -> None:
    """Every path on two groups against the padded one in fp32; in bf16 beside two padded runs cut differently."""
    groups = bench.minis[0][:2]
    ones = singles(groups)
    samples = len(ones)
    half = str(bench.half).removeprefix("torch.")

    def run(kind: type[Padded] | type[Packed], dtype: torch.dtype, micro_batches: Cut) -> tuple[Tensor, Gradients]:
        path = kind(bench, dtype)
        log_probs = torch.cat(path.pass_over(micro_batches)).float().cpu()
        found = gradients(path)
        del path
        release()
        return log_probs, found

    def compare(
        name: str, found: tuple[Tensor, Gradients], base: tuple[Tensor, Gradients], how: str, ratio_to: str = ""
    ) -> None:
        difference = (found[0] - base[0]).abs()
        largest, mean = distance(found[1], base[1], bench.device)
        for kind, value, unit, most in (
            ("logprob", float(difference.mean()), "nats, mean", f"largest {difference.max():.3g}"),
            ("gradient", mean, "of the gradient, mean", f"largest entry {largest:.3g} of its tensor's largest"),
        ):
            base_row = f"parity_{kind}_{ratio_to}" if ratio_to else ""
            bench.add(f"parity_{kind}_{name}", value, unit, f"{how}; {most}", samples=samples, ratio_to=base_row)

    judge = run(Padded, torch.float32, cut(ones, 1))
    exact = "to padded fp32"
    compare("packed_fp32", run(Packed, torch.float32, cut(ones, 2)), judge, f"packed, fp32, {exact}")
    compare("shared_fp32", run(Packed, torch.float32, cut(groups, 1)), judge, f"shared, fp32, {exact}")
    one = run(Padded, bench.half, cut(ones, _PADDED_SAMPLES))
    compare("padded", one, judge, f"padded, {half}, {exact}")
    other = run(Padded, bench.half, cut(ones, 2))
    compare("padded_recut", other, judge, f"padded, {half}, other micro-batches, {exact}")
    compare("padded_noise", other, one, f"two padded runs, {half}, cut into other micro-batches")
    del other
    for name, units in (("packed", cut(ones, 4)), ("shared", cut(groups, 2))):
        found = run(Packed, bench.half, units)
        compare(name, found, judge, f"{name}, {half}, {exact}", ratio_to="padded")
        compare(f"{name}_to_padded", found, one, f"{name} to padded, both {half}", ratio_to="padded_noise")


def ablation(bench: Bench) -> None:
    """The shared pass with one switch at a time, all at one size of the micro-batch."""
    mini = bench.minis[0]
    micro_batches = cut(mini, min(bench.ablation_groups, len(mini)))
    switches: dict[str, tuple[Switch, bool, bool]] = {name: (switch, False, False) for name, switch in SWITCHES.items()}
    switches["checkpointing"] = (SWITCHES["base"], True, False)
    switches["packed_in_the_same_thread"] = (SWITCHES["base"], False, True)
    for name, (switch, checkpointing, same_thread) in switches.items():

        def run(switch: Switch, checkpointing: bool, same_thread: bool) -> Timing:
            path = Packed(bench, bench.half, checkpointing=checkpointing)
            path.runner.pack_ahead = path.runner.pack_ahead and not same_thread
            with switch(path.policy):
                return timed(lambda: path.pass_over(micro_batches), bench.deadline)

        if bench.switches and name not in bench.switches:
            continue
        how = f"{name}, shared prefix, {len(micro_batches[0])} groups a micro-batch"
        try:
            result: Timing | Missed = attempt(partial(run, switch, checkpointing, same_thread))
        except (ValueError, RuntimeError) as error:  # a switch that this machine does not have is a row as well
            result = Missed(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        release()
        bench.add_timing(f"ablation_{name}_s", result, how, mini, passes=3, shared=True)


ROWS: dict[str, Callable[[Bench], None]] = {
    "padded_ckpt": lambda bench: padded(bench, "train_padded_ckpt_s", checkpointing=True),
    "padded": lambda bench: padded(bench, "train_padded_s", checkpointing=False),
    "packed": lambda bench: packed(bench, "train_packed_s", shared=False),
    "shared": lambda bench: packed(bench, "train_shared_s", shared=True),
    "reference": reference,
    "update": update,
    "parity": parity,
    "ablation": ablation,
}


def run_rows(bench: Bench, names: Sequence[str]) -> None:
    for name in ROWS:
        if name not in names:
            continue
        if bench.deadline.left <= 0:
            bench.add(name, None, "", "not run: the time limit had passed", samples=0)
            continue
        missed = attempt(lambda name=name: ROWS[name](bench))
        if isinstance(missed, Missed):
            bench.add(name, None, "", missed.reason, samples=0)
        release()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=sorted(WORKLOADS), default="3b")
    parser.add_argument("--model", type=Path, help="folder of the model (made when absent); default: a temporary one")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS)[:-1])
    parser.add_argument("--seconds", type=float, default=1800.0, help="limit; rows that would start later are left out")
    parser.add_argument("--append", action="store_true", help="keep the rows of the result file")
    parser.add_argument("--groups", type=int, default=8, help="groups a micro-batch of the ablation")
    parser.add_argument("--switches", nargs="*", default=[], help="some switches of the ablation; default: all")
    parser.add_argument("--profile", action="store_true", help="write profile_<row>.txt of every fast row")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of train_step.json")
    return parser.parse_args(argv)


def make_bench(args: argparse.Namespace) -> Bench:
    """Data and model of the workload, on a process group of one."""
    deadline = Deadline.after(args.seconds)
    workload = WORKLOADS[args.model_size]
    folder = args.model or Path(tempfile.gettempdir()) / f"timemaster-{workload.name.lower()}"
    device = resolve_device("auto")
    start_process_group_from_env(device)
    ctu_3b_model(folder, workload)
    prompts, patches = ctu_3b_prompts(workload=workload, device=device)
    minis = [
        ctu_3b_groups(prompts[start : start + workload.mini_batch], workload, with_old=start > 0, seed=1 + start)
        for start in range(0, len(prompts), workload.mini_batch)
    ]
    options = {"switches": args.switches, "profile": args.profile, "append": args.append}
    return Bench(workload, folder, device, deadline, args.results, patches, minis, args.groups, **options)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    bench = make_bench(args)
    run_rows(bench, args.rows)
    bench.write(show=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
