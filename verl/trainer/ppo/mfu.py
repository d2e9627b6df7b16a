"""Model FLOPs utilisation of the actor: work counted where it is dispatched, time taken from the step's phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from verl.protocol import TrainGroup
from verl.utils.flops import FlopCounter


@dataclass
class FlopMeter:
    """Adds up one step's FLOPs. `peak` is that of one device; None (a CPU, an unknown card): no metrics."""

    counter: FlopCounter
    peak: float | None
    ranks: int
    logical: dict[str, float] = field(default_factory=dict)
    computed: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, groups: Sequence[TrainGroup]) -> None:
        """`kind` is actor (forward and backward, as far as the counter's parts are trained) or actor_infer."""
        if self.peak is None:
            return
        count = self.counter.training if kind == "actor" else self.counter.forward
        for found, shared in ((self.logical, False), (self.computed, True)):
            found[kind] = found.get(kind, 0.0) + count(groups, shared=shared)

    def metrics(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """`perf/mfu/<kind>` on logical tokens (every answer with its own prompt) and `.../<kind>_computed` on those
        that the shared-prefix forward meets; then the meter is empty again."""
        time = {
            "actor": seconds.get("update_actor", 0.0),
            "actor_infer": seconds.get("old_log_prob", 0.0) + seconds.get("ref", 0.0),
        }
        found: dict[str, float] = {}
        for kind, logical in self.logical.items():
            if time[kind] > 0 and self.peak is not None:
                capacity = time[kind] * self.peak * self.ranks
                found[f"perf/mfu/{kind}"] = logical / capacity
                found[f"perf/mfu/{kind}_computed"] = self.computed[kind] / capacity
        self.logical.clear()
        self.computed.clear()
        return found
