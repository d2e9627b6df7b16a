"""The driver's side of the canary: whom it compares, what it refuses and what it reports. Workers are played."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from verl.config import load
from verl.protocol import LogProbs, Prompt, Response, StopReason, TrainGroup
from verl.trainer.ppo.canary import Canary
from verl.trainer.ray_trainer import Trainer
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.canary import CanaryError

SAMPLING = Sampling(
    n=8,
    temperature=0.7,
    top_k=20,
    top_p=0.9,
    do_sample=True,
    max_tokens=999,
    max_context=2000,
    ignore_eos=False,
    seed=0,
)
PROMPTS = [
    Prompt("text", 0, "played", np.array([1], np.int32), (), (), "A"),
    Prompt("plot", 1, "played", np.array([1, 2], np.int32), ("image",), ((1, 2, 2),), "A"),
]
TOKENS = 4
TRUE = np.full(TOKENS, -1.0, np.float32)
NOWHERE = Path("model")


def spread(worst: float, mean: float) -> LogProbs:
    """Differences of that worst and that mean."""
    rest = (mean * TOKENS - worst) / (TOKENS - 1)
    return np.array([worst] + [rest] * (TOKENS - 1), np.float32)


class Engines:
    """One answer each, of tokens that tell which engine wrote it; log-probs are off by `errors`."""

    def __init__(self, *errors: LogProbs, rounding: float = 0.0, places: Sequence[str] = ("cpu", "cpu")) -> None:
        self.errors, self.engines, self.rounding = errors, len(errors), rounding
        self.places = dict(zip(("fp32", "bf16"), places, strict=True))
        self.asked: list[tuple[Sequence[Prompt], Sampling]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int) -> list[list[Response]]:
        self.asked.append((prompts, sampling))
        return [
            [Response(np.full(TOKENS, engine, np.int32), TRUE + error, StopReason.LENGTH)]
            for engine, error in enumerate(self.errors)
        ]

    def plain_log_probs(self, *_: Any, dtype: str, temperature: float) -> tuple[LogProbs, str]:
        assert temperature == SAMPLING.temperature
        return TRUE + (self.rounding if dtype == "bf16" else 0.0), self.places[dtype]


class Actor:
    def log_probs(self, groups: Sequence[TrainGroup], *, reference: bool) -> dict[int, LogProbs]:
        assert not reference
        return {s.index: TRUE for g in groups for s in g.samples}


def canary(engines: Engines, device: str = "cpu") -> Canary:
    return Canary(Actor(), engines, PROMPTS, SAMPLING, device=device)  # type: ignore[arg-type]


NONE = np.zeros(TOKENS, np.float32)


def test_equal_log_probs_pass_with_a_real_plot_and_the_actors_own_distribution() -> None:
    engines = Engines(NONE, NONE)
    line = canary(engines).start(NOWHERE)
    assert line.startswith("canary (plot, 1 plot(s), 4 tokens, 2 engine(s), plain fp32 on cpu): "), line
    (prompts, sampling), *_ = engines.asked
    assert [p.uid for p in prompts] == ["plot", "plot"]
    assert (sampling.n, sampling.top_k, sampling.top_p, sampling.temperature) == (1, -1, 1.0, 0.7)
    assert canary(engines).check(3) == {"canary/logprob_diff_max": 0.0, "canary/logprob_diff_mean": 0.0}


@pytest.mark.parametrize("wrong", [0, 1])
def test_shifted_log_probs_of_any_engine_are_refused_at_the_start_and_later(wrong: int) -> None:
    errors = [NONE, NONE]
    errors[wrong] = NONE + 0.01
    with pytest.raises(CanaryError, match=f"canary at the start, engine {wrong}: .*worst 0.01"):
        canary(Engines(*errors)).start(NOWHERE)
    with pytest.raises(CanaryError, match=f"canary at step 3, engine {wrong}: .*worst 0.01"):
        canary(Engines(*errors)).check(3)


def test_the_worst_of_all_engines_is_reported_whichever_has_the_largest_mean() -> None:
    engines = Engines(NONE, spread(4e-4, 1e-4), spread(2e-4, 1.5e-4))
    metrics = canary(engines).check(1)
    assert metrics["canary/logprob_diff_max"] == pytest.approx(4e-4, rel=1e-3)
    assert metrics["canary/logprob_diff_mean"] == pytest.approx(1.5e-4, rel=1e-3)
    line = canary(engines).start(NOWHERE)
    assert "engine to actor worst 0.0004, mean 0.00015;" in line, line
    assert "engine to plain fp32 worst 0, mean 0;" in line, "the plain model reads the first engine's answer"


def test_on_a_gpu_the_yardstick_is_printed_with_the_devices_it_was_measured_on() -> None:
    engines = Engines(spread(0.03, 0.015), rounding=0.01, places=("cpu", "cuda"))
    line = canary(engines, "cuda").start(NOWHERE)
    assert "1 engine(s), plain fp32 on cpu, plain bf16 on cuda): " in line, line
    means = {name.strip(): float(mean) for name, mean in re.findall(r"([\w ]+?) worst \S+, mean ([^;\s]+)", line)}
    assert means["engine to actor"] == pytest.approx(0.015) and means["plain bf16 to plain fp32"] == pytest.approx(0.01)
    with pytest.raises(CanaryError, match=r"5\.0 times, more than 4 times is refused"):
        canary(Engines(NONE, NONE + 0.05, rounding=0.01), "cuda").start(NOWHERE)


def test_a_suspicious_distance_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    canary(Engines(NONE + 0.03, rounding=0.01), "cuda").start(NOWHERE)
    assert "3.0 times, more than 2 times is suspicious" in caplog.text


def test_adapters_are_not_in_the_plain_model_so_only_engine_and_actor_are_compared() -> None:
    assert "to plain fp32" not in canary(Engines(NONE)).start(NOWHERE, adapted=True)


@pytest.mark.parametrize(("name", "warned"), [("vllm", True), ("hf", False)])
def test_an_evaluation_without_a_distribution_to_compare_says_that_it_has_no_canary(
    name: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rollout = "actor_rollout_ref.rollout"
    trainer = Trainer.__new__(Trainer)
    trainer.config = load(
        "ppo_trainer", ["trainer.val_only=True", f"{rollout}.name={name}", f"{rollout}.temperature=0"]
    )
    trainer.workers, trainer.checkpoint, trainer.canary = SimpleNamespace(), None, None  # type: ignore[assignment]
    trainer._start_canary(PROMPTS)
    assert trainer.canary is None and ("no canary: " in caplog.text) is warned
