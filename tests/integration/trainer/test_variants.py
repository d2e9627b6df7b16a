"""Variants of a run, each from the entry point to its checkpoint: KL terms, failed scores, frozen parts, bad steps."""

from __future__ import annotations

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import rl_here, sft_here
from runs import LONG_RUN, Data, Run, begin_at, differences, pointer, rl_overrides, sft_overrides
from safetensors import safe_open
from torch import Tensor

from verl.protocol import Response
from verl.utils.checkpoint.manager import open_checkpoint
from verl.workers.actor.worker import ActorWorker, MiniBatch
from verl.workers.rollout.worker import RolloutWorker

ACTOR = "actor_rollout_ref.actor"

RunRL = Callable[..., Run]


@pytest.fixture
def rl(request: pytest.FixtureRequest, work: Path, data: Data, start: Path) -> RunRL:
    """A run of one step, not yet judged by its exit code; `extra` wins."""
    folder = work / re.sub(r"\W+", "_", request.node.name)  # brackets mean a list in an override

    def run(*extra: str, model: Path = start, name: str = "run") -> Run:
        return rl_here(rl_overrides(data, model, folder / name, *extra), folder / name)

    return run


def tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def moved(run: Run, start: Path) -> dict[str, bool]:
    """Whether each weight of the last checkpoint differs from the start in any bit."""
    before = tensors(start)
    after = tensors(run.checkpoint(pointer(run.folder)) / "actor" / "huggingface")
    assert before.keys() == after.keys()
    return {name: not value.equal(after[name]) for name, value in before.items()}


# --- KL ----------------------------------------------------------------------------------------------------------


def test_without_a_kl_term_there_is_no_reference_and_no_kl_metric(rl: RunRL) -> None:
    run = rl().ok()
    assert run.extra["workers"]["actor"].reference is None and "reference: none" in run.out
    row = run.steps[1]
    assert [name for name in row if "kl_loss" in name or "critic/kl" in name or name == "timing_s/ref"] == []
    assert row["critic/rewards/mean"] == row["critic/score/mean"]


def test_a_kl_in_the_reward_is_subtracted_from_the_score_and_starts_at_zero(rl: RunRL) -> None:
    control = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.5", "trainer.total_training_steps=2"]
    run = rl(*control, "algorithm.kl_penalty=low_var_kl").ok()
    first, second = run.steps[1], run.steps[2]
    assert first["critic/kl"] == pytest.approx(0.0, abs=1e-9) and second["critic/kl"] > 1e-6
    for row in (first, second):
        assert row["critic/kl_coeff"] == 0.5
        # critic/kl is a mean over tokens; an answer loses the sum over its own
        penalty = 0.5 * row["critic/kl"] * row["response_length/mean"]
        assert row["critic/rewards/mean"] == pytest.approx(row["critic/score/mean"] - penalty, rel=1e-6, abs=1e-7)
        assert "actor/kl_loss" not in row


def test_invariant_4_an_adaptive_kl_coefficient_follows_its_rule_also_over_a_resume(rl: RunRL) -> None:
    control = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.kl_coef=0.1"]
    control += ["algorithm.kl_ctrl.horizon=32", "algorithm.kl_ctrl.target_kl=1e-3", "trainer.save_freq=2"]
    run = rl(*control, "trainer.total_training_steps=3").ok()
    rows = [run.steps[step] for step in (1, 2, 3)]
    coefficient = 0.1
    for row in rows:
        assert row["critic/kl_coeff"] == pytest.approx(coefficient, rel=1e-6)
        coefficient *= 1 + float(np.clip(row["critic/kl"] / 1e-3 - 1, -0.2, 0.2)) * 16 / 32
    named = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={run.checkpoint(2)}"]
    again = rl(*control, "trainer.total_training_steps=3", *named, name="again").ok()
    assert again.answers(3) == run.answers(3)
    assert differences(again.steps[3], run.steps[3]) == []


# --- the sampler -------------------------------------------------------------------------------------------------

CORRECTION = "algorithm.rollout_correction"


@pytest.mark.parametrize(
    "how",
    [
        (),
        (f"{CORRECTION}.bypass_mode=True",),
        (f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.loss_type=reinforce"),
        (f"{CORRECTION}.rollout_is=token",),
    ],
    ids=["plain", "bypass", "reinforce", "weights"],
)
def test_sampler_and_actor_are_compared_before_the_first_update_of_every_step_in_every_mode(
    rl: RunRL, how: tuple[str, ...]
) -> None:
    """Two optimizer steps of a visible size: the second one's log-probs are of other weights and do not count."""
    run = rl(*how, "trainer.total_training_steps=2", f"{ACTOR}.entropy_coeff=0.5", f"{ACTOR}.optim.lr=1e-2").ok()
    for step in (1, 2):
        row = run.steps[step]
        assert 0 < row["training/rollout_probs_diff_max"] < 1e-4, row["training/rollout_probs_diff_max"]
        names = ("training/rollout_probs_diff_mean", "training/rollout_probs_diff_std", "rollout_corr/k3_kl")
        assert all(abs(row[name]) < 1e-4 for name in (*names, "rollout_corr/kl")), row
        assert row["training/rollout_actor_probs_pearson_corr"] == pytest.approx(1.0, abs=1e-4)


# --- what workers are told -------------------------------------------------------------------------------------


def test_workers_know_how_many_rows_a_validation_answers_at_a_time(rl: RunRL) -> None:
    run = rl("trainer.test_freq=1").ok()
    assert "0 of 8 rows" not in run.out and "of 8 rows" in run.out
    assert run.extra["workers"]["actor"].config.data.val_batch_size == 8


# --- scores ------------------------------------------------------------------------------------------------------

FAILING = """
import zlib

def compute_score(solution_str, ground_truth, extra_info):
    number = zlib.crc32(solution_str.encode())
    if number % 3 == 0 or extra_info["index"] % 4 == 0:
        raise RuntimeError("no score for this one")
    return number % 7 / 6
"""


def totals(group: dict[str, Any]) -> list[float]:
    return [a["score"] for a in group["answers"] if a["score"] is not None]


def normalised(values: list[float]) -> list[float]:
    return [(value - float(np.mean(values))) / (float(np.std(values, ddof=1)) + 1e-6) for value in values]


def test_invariant_7_a_failed_score_is_in_no_mean_no_loss_and_no_denominator(
    rl: RunRL, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = work / "failing.py"
    function.write_text(FAILING)
    trained: list[MiniBatch] = []
    update = ActorWorker.update

    def recorded(self: ActorWorker, mini_batches: Sequence[MiniBatch]) -> list[dict[str, float]]:
        trained.extend(mini_batches)
        return update(self, mini_batches)

    monkeypatch.setattr(ActorWorker, "update", recorded)
    sizes = ["data.train_batch_size=16", f"{ACTOR}.ppo_mini_batch_size=8", "reward.max_failure_rate=1"]
    run = rl(f"custom_reward_function.path={function}", *sizes).ok()
    groups, row = run.answers(1), run.steps[1]
    kept = [g for g in groups if len(totals(g)) >= 2]
    failed = sum(a["failed"] is not None for g in groups for a in g["answers"])
    assert 0 < failed < 64 and 0 < len(kept) < 16, "the test needs both kinds"
    for answer in (a for g in groups for a in g["answers"]):
        number = zlib.crc32(answer["text"].encode())
        assert answer["score"] in (None, number % 7 / 6) and (number % 3 or answer["score"] is None)
        assert (answer["score"] is None) == (answer["failed"] or "").startswith("exception"), answer
    assert row["reward/failed/count"] == row["training/groups/failed_answers"] == failed
    assert row["training/groups/dropped"] == 16 - len(kept)
    scores = [s for g in groups for s in totals(g)]
    assert row["critic/score/mean"] == pytest.approx(np.mean(scores))
    advantages = [a for g in kept for a in normalised(totals(g))]
    assert row["critic/advantages/max"] == pytest.approx(max(advantages), rel=1e-5)
    assert row["critic/advantages/min"] == pytest.approx(min(advantages), rel=1e-5)

    samples = [[s for micro in m.micro_batches for g in micro for s in g.samples] for m in trained]
    lengths = Counter(len(s.token_ids) for mini in samples for s in mini)
    assert lengths == Counter(a["tokens"] for g in kept for a in g["answers"] if a["score"] is not None)
    assert [m.tokens for m in trained] == [sum(len(s.token_ids) for s in mini) for mini in samples]
    for mini in samples:
        assert sum(float(s.weights.sum()) for s in mini) == pytest.approx(1.0, rel=1e-5)


def test_invariant_7_equal_scores_teach_exactly_nothing_and_the_run_says_so(
    rl: RunRL, work: Path, start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    function = work / "equal.py"
    function.write_text("def compute_score(solution_str, ground_truth):\n    return 0.1\n")
    steps = ("trainer.total_training_steps=4", "trainer.save_freq=4")
    run = rl(f"custom_reward_function.path={function}", f"{ACTOR}.optim.weight_decay=0", *steps).ok()
    row = run.steps[4]
    assert (row["critic/advantages/min"], row["critic/advantages/max"], row["actor/grad_norm"]) == (0.0, 0.0, 0.0)
    assert row["training/groups/equal_share"] == 1.0
    assert not any(moved(run, start).values())
    said = [record.getMessage() for record in caplog.records if "nothing is learned" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(
        "3 steps in which all answers of every group scored alike (mean 0.100)"
    )


def test_invariant_7_above_the_set_rate_of_failures_the_run_stops(rl: RunRL, work: Path) -> None:
    function = work / "failing_often.py"
    function.write_text(FAILING)
    run = rl(f"custom_reward_function.path={function}", "reward.max_failure_rate=0.05")
    last = run.err.splitlines()[-1]
    assert run.code == 1 and run.extra["raised"] is None, run.err
    assert last.startswith("error: ") and "reward.max_failure_rate" in last and "exception" in last
    assert not run.steps, "nothing was trained on this batch"


SHAPES = """
import itertools, json, threading
import numpy as np, torch
from verl.protocol import Score

SHAPES = {
    "int": (lambda: 1, 1.0), "float": (lambda: 0.25, 0.25), "bool": (lambda: True, 1.0),
    "numpy": (lambda: np.float32(0.5), 0.5), "array": (lambda: np.array(0.75), 0.75),
    "tensor": (lambda: torch.tensor(0.125), 0.125),
    "dict": (lambda: {"score": 0.5, "acc": 1.0, "note": "seen"}, 0.5),
    "four": (lambda: (0.9, 1, 0, 0), 0.9), "unparsed": (lambda: (0.0, 0, 3, 0), 0.0),
    "five": (lambda: (1.4, 1, 1, 1, 0.5), 1.4), "tuple": (lambda: (0.3, "why"), 0.3), "list": (lambda: [0.2, 9], 0.2),
    "score": (lambda: Score.ok(0.6, {"format": 1.0}), 0.6),
    "none": (lambda: None, "none"), "nan": (lambda: float("nan"), "not_finite"),
    "infinite": (lambda: (float("inf"), 1, 0, 0), "not_finite"), "raise": (lambda: 1 / 0, "exception"),
    "text": (lambda: "good", "bad_return"), "no score": (lambda: {"reward": 1.0}, "bad_return"),
    "empty": (lambda: (), "bad_return"),
}
ORDER, LOCK = itertools.cycle(SHAPES), threading.Lock()

def compute_score(solution_str, ground_truth, log):
    with LOCK:
        shape = next(ORDER)
        make, expected = SHAPES[shape]
        with open(log, "a") as file:
            file.write(json.dumps([solution_str, shape, expected]) + "\\n")
    return make()
"""


def test_every_return_shape_of_a_custom_reward_function_goes_through_a_run(rl: RunRL, work: Path) -> None:
    function, log = work / "shapes.py", work / "shapes.log"
    function.write_text(SHAPES)
    path = [f"custom_reward_function.path={function}", f"custom_reward_function.reward_kwargs.log={log}"]
    run = rl(*path, "data.train_batch_size=8", "reward.max_failure_rate=1").ok()
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({shape for _, shape, _ in calls}) == 20 and len(calls) == 32
    answers = [a for group in run.answers(1) for a in group["answers"]]
    found = Counter((a["text"], (a["failed"] or "").partition(":")[0] or a["score"]) for a in answers)
    assert found == Counter((text, expected) for text, _, expected in calls)
    failures = Counter(expected for _, _, expected in calls if isinstance(expected, str))
    row = run.steps[1]
    assert {kind: row[f"reward/failed/{kind}"] for kind in failures} == failures
    assert np.isfinite(row["actor/grad_norm"]) and row["actor/grad_norm"] > 0


# --- the policy --------------------------------------------------------------------------------------------------


def test_invariant_8_a_run_never_draws_a_banned_id_however_likely_it_is(
    rl: RunRL, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with random weights draws every id alike, so a run without the mask would draw some of these."""
    drawn: list[Response] = []
    generate = RolloutWorker.generate

    def recorded(self: RolloutWorker, *args: Any, **kwargs: Any) -> list[list[Response]]:
        answers = generate(self, *args, **kwargs)
        drawn.extend(a for group in answers for a in group)
        return answers

    monkeypatch.setattr(RolloutWorker, "generate", recorded)
    run = rl("data.train_batch_size=8", "trainer.save_freq=1", model=tiny).ok()
    policy = run.extra["workers"]["actor"].engine.policy
    banned = set(policy.banned.nonzero()[:, 0].tolist())
    config = policy.config
    assert {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id} <= banned
    ids = np.concatenate([a.token_ids for a in drawn])
    chance = len(ids) * len(banned) / len(policy.banned)
    assert chance > 10, f"{len(ids)} tokens would hold only {chance:.1f} banned ids: the test proves nothing"
    assert not banned & set(ids.tolist())
    exported = json.loads((run.checkpoint(1) / "actor/huggingface/generation_config.json").read_text())
    assert set(exported["suppress_tokens"]) == banned


def test_a_frozen_vision_tower_is_bit_equal_after_a_run(rl: RunRL, start: Path) -> None:
    run = rl(f"{ACTOR}.freeze_vision_tower=True", f"{ACTOR}.optim.weight_decay=0.1", "trainer.save_freq=1").ok()
    changed = moved(run, start)
    tower = {name for name in changed if "visual." in name}
    assert tower and {name for name, did in changed.items() if did} == set(changed) - tower


def test_a_non_finite_step_is_skipped_and_counted_and_the_run_goes_on(rl: RunRL, start: Path) -> None:
    """An entropy weight beyond fp32 makes every gradient infinite."""
    steps = ["trainer.total_training_steps=2", "trainer.save_freq=2", f"{ACTOR}.optim.lr_warmup_steps=10"]
    run = rl(f"{ACTOR}.entropy_coeff=1e39", *steps).ok()
    assert [row["training/skipped_steps"] for row in run.steps.values()] == [2.0, 2.0]
    assert not [row for row in run.steps.values() if "actor/grad_norm" in row], "a mean over no finite step is left out"
    assert not any(moved(run, start).values()), "a skipped step changes no weight"
    assert open_checkpoint(run.checkpoint(2)).read_data()["engine"] == {"steps": 4, "skipped": 4}
    rates = [row["actor/lr"] for row in run.steps.values()]
    assert rates[1] > rates[0] > 0, "the schedule's clock goes on"


def test_checkpoints_cross_over_between_optimizer_offload_and_none_bit_for_bit(
    work: Path, data: Data, start: Path, long_run_here: Run
) -> None:
    """Invariant 4 whatever the setting: step 4 with the state offloaded, 5 and 6 without."""
    folder = begin_at(work / "offload", long_run_here, 3)
    offload = f"{ACTOR}.fsdp_config.optimizer_offload=True"
    until = ["trainer.total_training_steps=4", f"{ACTOR}.optim.total_training_steps=12", "trainer.test_freq=3"]
    first = rl_here(rl_overrides(data, start, folder, *LONG_RUN, *until, offload, "trainer.save_freq=1"), folder).ok()
    assert first.extra["workers"]["actor"].engine.offload is not None
    assert first.answers(4) == long_run_here.answers(4)
    second = rl_here(rl_overrides(data, start, folder, *LONG_RUN), folder).ok()
    assert second.extra["workers"]["actor"].engine.offload is None
    for step in (5, 6):
        assert second.answers(step) == long_run_here.answers(step), f"step {step}"
        assert differences(second.steps[step], long_run_here.steps[step]) == [], f"step {step}"


def test_the_seed_of_supervised_training_fixes_what_foreign_code_draws(work: Path, data: Data, tiny: Path) -> None:
    short = ("trainer.total_training_steps=1", "trainer.test_freq=-1", "data.val_batch_size=8")
    state = random.getstate()
    draws = []
    for number, seed in enumerate((1, 1, 2)):
        folder = work / f"sft_seed_{number}"
        sft_here(sft_overrides(data, tiny, folder, *short, f"trainer.seed={seed}"), folder).ok()
        draws.append(random.random())
    random.setstate(state)
    assert draws[0] == draws[1] != draws[2]
