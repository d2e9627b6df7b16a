"""What fills a GPU in each phase of a step, whether it fits, and which memory switches that takes. Pure; no torch.

Invariants
- More ranks, and every switch that is turned on, never raise the peak.
- A switch that the user fixed is never changed; one set to `auto` is on only where the run would not fit without.
- What does not fit is an error that names the keys to change.

An estimate, on the safe side: counted from the model's config.json and calibrated as `verl.models.sizes` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from verl.models.sizes import FUSED, LayerActivations, ModelSizes

GIB = 1 << 30
WORKSPACE = int(4.5 * GIB)
"""Chunks of logits, kernels' workspace and gaps: measured peaks less what is counted (1x H200, CTU-3B)."""
CONTEXT = GIB
"""A process's CUDA context and loaded kernels."""
MARGIN = 0.95
"""Share of the GPU that the plan fills where it may choose; a run is refused only above the whole of it."""
ENGINE_EXTRA = 2 * GIB
"""vLLM beside weights and cache: CUDA graphs and workspace. About what it keeps while it sleeps."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a run asks of one GPU. Bytes are per number: 4 for fp32, 2 for bf16."""

    sizes: ModelSizes
    shards: int
    """Ranks that share one copy of the trained model."""
    frozen_vision: bool
    adapters: int = 0
    """Parameters of adapters; 0: the weights themselves are trained. Weights under adapters are held in `compute`."""
    trained: int | None = None
    """Parameters that are trained, where patterns freeze some; None: those that `frozen_vision` and `adapters` say."""
    master: int
    compute: int
    reduce: int
    tokens: float
    """Text tokens of the largest micro-batch of an update; 0: nothing is trained."""
    patches: float
    reference: bool
    engine: str
    """vllm, hf, or none where the rollout has GPUs of its own."""
    utilization: float
    """Share of the GPU that vLLM takes while it is awake."""
    given_cache: int | None = None
    """Bytes of vLLM's cache; with them the share does not matter."""
    tensor_parallel: int
    sequences: int
    """Answers that one engine writes at the same time."""
    context: int
    """Longest prompt + answer."""
    bucket: int
    """Bytes of one weight bucket."""
    device: int
    """Bytes of the GPU."""
    kind: LayerActivations = FUSED


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What can be given up for memory, in the order in which it is: the cheapest first."""

    sleep: bool = False
    """The engine drops weights and cache while the actor computes."""
    reshard_after_forward: bool = False
    """Blocks are gathered again in the backward pass."""
    reference_offload: bool = False
    optimizer_offload: bool = False
    checkpointing: bool = False
    param_offload: bool = False


KEYS = {
    "sleep": "actor_rollout_ref.rollout.free_cache_engine",
    "reshard_after_forward": "actor_rollout_ref.actor.fsdp_config.reshard_after_forward",
    "reference_offload": "actor_rollout_ref.ref.fsdp_config.param_offload",
    "optimizer_offload": "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    "checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
    "param_offload": "actor_rollout_ref.actor.fsdp_config.param_offload",
}
GIVEN_CACHE = "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes"


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU."""

    parts: Mapping[str, float]
    """What lies there while the actor computes, by name."""
    phases: Mapping[str, float]
    """Peak of each phase."""

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def tightest(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def estimate(demand: Demand, switches: Switches) -> Estimate:
    """Parts and peaks of a run."""
    d, on = demand, switches
    total = d.sizes.parameters
    whole = d.sizes.text.parameters if d.frozen_vision else total
    trained = (d.trained if d.trained is not None else d.adapters or whole) if d.tokens else 0
    held_weights = d.compute * total + d.master * d.adapters if d.adapters else d.master * total
    adam = 2 * d.master * trained / d.shards
    block = 2 * d.compute * d.sizes.text.layer_parameters
    parts: dict[str, float] = {
        "weights": 0 if on.param_offload else held_weights / d.shards,
        "optimizer": 0 if on.optimizer_offload or on.param_offload else adam,
        "reference": 0 if on.reference_offload or not d.reference or d.adapters else d.compute * total / d.shards,
        # Reduced once a mini-batch: until then every rank adds up the gradients of the whole model.
        "gradients": max(d.reduce, d.compute) * trained,
        "gathered weights": min(block, d.compute * total) if on.reshard_after_forward else d.compute * total,
        "activations": d.sizes.activation_bytes(d.tokens, d.patches, kind=d.kind, checkpointing=on.checkpointing),
        "workspace": WORKSPACE if d.tokens else 0,
        "engine": _asleep(d) if on.sleep else _awake(d),
        "buckets": 2 * max(d.bucket, d.compute * d.sizes.text.vocabulary * d.sizes.text.hidden),
        "contexts": CONTEXT * (1 if d.engine == "none" else 2),
    }
    if not d.tokens:
        parts["gathered weights"] = min(block, parts["gathered weights"])
    held = parts["weights"] + parts["optimizer"] + parts["reference"] + parts["buckets"] + parts["contexts"]
    step = 0 if on.param_offload else adam - parts["optimizer"]
    phases = {
        "generate": held + _awake(d),
        "update": sum(parts.values()),
        "optimizer step": held + parts["gradients"] + step + parts["engine"],
    }
    return Estimate(parts, phases)


def _awake(d: Demand) -> float:
    if d.engine == "vllm":
        return d.utilization * d.device if d.given_cache is None else _beside_cache(d) + d.given_cache
    return 0.0 if d.engine == "none" else d.compute * d.sizes.parameters + wanted_cache(d)


def _asleep(d: Demand) -> float:
    return min(float(ENGINE_EXTRA), _awake(d)) if d.engine == "vllm" else _awake(d)


def _beside_cache(d: Demand) -> float:
    """Bytes of vLLM without its cache."""
    return d.compute * d.sizes.parameters / d.tensor_parallel + ENGINE_EXTRA


def wanted_cache(demand: Demand) -> float:
    """Bytes of the cache in which all sequences have room for the longest context."""
    return demand.sequences * demand.context * demand.sizes.text.kv_bytes / demand.tensor_parallel


def engine_cache(demand: Demand) -> float:
    """Bytes that vLLM has for its cache; negative when the weights alone do not fit."""
    if demand.given_cache is not None:
        return float(demand.given_cache)
    return demand.utilization * demand.device - _beside_cache(demand)


@dataclass(frozen=True)
class MemoryPlan:
    """The switches of a run, why those that were left to the plan are on, and what is expected."""

    switches: Switches
    reasons: Mapping[str, str]
    """By switch: why the plan turned it on or left it off."""
    estimate: Estimate
    demand: Demand

    def table(self) -> str:
        """The plan for people: one line a part, then peaks, then decisions."""
        gib = {name: size / GIB for name, size in self.estimate.parts.items() if size}
        lines = [f"memory of one GPU ({self.demand.device / GIB:.0f} GiB), estimated in GiB:"]
        lines += [f"  {name:<18}{size:8.1f}" for name, size in gib.items()]
        if self.demand.engine == "vllm":
            have, wanted = engine_cache(self.demand) / GIB, wanted_cache(self.demand) / GIB
            lines.append(f"  vLLM's cache: {have:.1f}, all answers at full length would fill {wanted:.1f}")
        if self.demand.adapters:
            lines.append(f"  adapters alone are trained ({self.demand.adapters:,}); the reference is the actor without")
        peaks = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.estimate.phases.items())
        lines.append(f"  peaks: {peaks}")
        lines += [f"  {KEYS[name]}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def plan_memory(demand: Demand, fixed: Mapping[str, bool]) -> MemoryPlan:
    """Decide every switch that `fixed` does not name. Raises ValueError when the run cannot fit."""
    names = [field.name for field in dataclasses.fields(Switches)]
    free = [name for name in names if name not in fixed]
    chosen = dict.fromkeys(free, False) | dict(fixed)
    _check_engine(demand)

    def peak(**changes: bool) -> float:
        return estimate(demand, Switches(**{**chosen, **changes})).peak

    room = MARGIN * demand.device
    for name in free:
        if peak() > room and peak(**{name: True}) < peak():
            chosen[name] = True
    for name in free:  # a cheap switch may have become needless with a costly one
        if chosen[name] and peak(**{name: False}) <= room:
            chosen[name] = False
    found = Switches(**chosen)
    expected = estimate(demand, found)
    if expected.peak > demand.device:
        raise ValueError(_does_not_fit(demand, found, expected, fixed))
    reasons = {}
    for name in free:
        without = peak(**{name: False}) / GIB
        reasons[name] = (
            f"on: without it the peak would be {without:.1f} GiB"
            if chosen[name]
            else f"off: the peak of {expected.peak / GIB:.1f} GiB fits"
        )
    return MemoryPlan(found, reasons, expected, demand)


def _check_engine(demand: Demand) -> None:
    if demand.engine != "vllm":
        return
    one = demand.context * demand.sizes.text.kv_bytes / demand.tensor_parallel
    if engine_cache(demand) >= one:
        return
    if demand.given_cache is not None:
        raise ValueError(
            f"{GIVEN_CACHE}={demand.given_cache} is {demand.given_cache / GIB:.1f} GiB, and one sequence of "
            f"{demand.context} tokens needs {one / GIB:.1f}: raise it"
        )
    raise ValueError(
        f"actor_rollout_ref.rollout.gpu_memory_utilization={demand.utilization:g} of {demand.device / GIB:.0f} GiB "
        f"leaves {engine_cache(demand) / GIB:.1f} GiB for vLLM's cache and one sequence of {demand.context} tokens "
        f"needs {one / GIB:.1f}: raise it, or actor_rollout_ref.rollout.tensor_model_parallel_size"
    )


def _does_not_fit(demand: Demand, found: Switches, expected: Estimate, fixed: Mapping[str, bool]) -> str:
    phase = expected.tightest
    worth = [
        KEYS[name]
        for name in fixed
        if not getattr(found, name)
        and estimate(demand, dataclasses.replace(found, **{name: True})).phases[phase] < expected.phases[phase]
    ]
    advice = [f"set {' or '.join(worth)} to auto or True"] if worth else []
    if phase == "update":
        advice.append(
            "lower actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu (or ppo_max_token_len_per_gpu with "
            "use_dynamic_bsz=True)"
        )
    if demand.engine == "vllm" and (phase == "generate" or not found.sleep):
        size = "actor_rollout_ref.rollout.gpu_memory_utilization" if demand.given_cache is None else GIVEN_CACHE
        advice.append(f"lower {size}")
    advice.append("use more GPUs")
    plan = MemoryPlan(found, {}, expected, demand)
    return (
        f"phase {phase!r} would need {expected.peak / GIB:.1f} GiB of a GPU with {demand.device / GIB:.1f} GiB: "
        f"{'; '.join(advice)}\n{plan.table()}"
    )
