"""Several ranks, and runs that were stopped: the same answers, rewards, losses and rows (invariants 1, 2, 4, 10)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from in_process import rl_here
from runs import LONG_RUN, Data, Launcher, Run, begin_at, differences, read_lines, rl_overrides

PLAN = ("global_seqlen/", "perf/")
"""Metrics that tell how work was spread over ranks, and therefore depend on their number."""


def spreadless(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(PLAN)}


def rows_seen(run: Run, step: int) -> list[str]:
    return [group["uid"] for group in run.answers(step)]


@pytest.fixture(scope="module")
def two_ranks(work: Path, data: Data, start: Path, launcher: Launcher) -> Run:
    """The first step of the long run on two ranks."""
    folder = work / "two_ranks"
    overrides = rl_overrides(data, start, folder, *LONG_RUN, "trainer.n_gpus_per_node=2", "trainer.save_freq=-1")
    return launcher.run("main_ppo", [*overrides, *stop_after(1)], folder).ok()


def stop_after(step: int) -> list[str]:
    """End early with the schedule of the whole run."""
    total = "actor_rollout_ref.actor.optim.total_training_steps=12"
    return [f"trainer.total_training_steps={step}", total, "trainer.val_before_train=False", "trainer.test_freq=-1"]


@pytest.fixture(scope="module")
def resumed(work: Path, data: Data, start: Path, long_run_here: Run) -> Run:
    """Steps 4 to 6, from the checkpoint of step 3, in a folder that already holds the first three steps."""
    folder = begin_at(work / "resumed", long_run_here, 3)
    return rl_here(rl_overrides(data, start, folder, *LONG_RUN), folder).ok()


@pytest.fixture(scope="module")
def resumed_on_two_ranks(work: Path, data: Data, start: Path, long_run: Run, launcher: Launcher) -> Run:
    """Step 4 on two ranks, from an older checkpoint of a run on one, named by its path."""
    folder = work / "resumed_on_two"
    named = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={long_run.checkpoint(3)}"]
    overrides = rl_overrides(data, start, folder, *LONG_RUN, *stop_after(4), *named, "trainer.n_gpus_per_node=2")
    return launcher.run("main_ppo", [*overrides, "trainer.save_freq=-1"], folder).ok()


def test_invariant_10_answers_and_scores_of_one_and_two_ranks_are_identical(long_run: Run, two_ranks: Run) -> None:
    """Invariant 10: sampling noise does not depend on the world size."""
    assert two_ranks.answers(1) == long_run.answers(1)


def test_invariants_1_and_2_metrics_of_the_first_step_agree_on_one_and_two_ranks(long_run: Run, two_ranks: Run) -> None:
    """Invariants 1 and 2 for the whole loop: losses, KL, entropy, gradient norm."""
    assert differences(spreadless(two_ranks.steps[1]), without_saves(long_run.steps[1]), 1e-4) == []


def without_saves(row: dict) -> dict:
    """Metrics of the step alone, without a validation that happened to follow."""
    return {name: value for name, value in spreadless(row).items() if not name.startswith("val")}


def test_the_plan_balances_two_ranks(two_ranks: Run) -> None:
    """Each mini-batch holds two groups here, so the loads differ by less than the largest group could weigh."""
    row = two_ranks.steps[1]
    largest_group = row["prompt_length/max"] + 4 * row["response_length/max"]
    assert row["global_seqlen/balanced_max"] - row["global_seqlen/balanced_min"] <= largest_group
    assert row["global_seqlen/balanced_min"] + row["global_seqlen/balanced_max"] == 2 * row["global_seqlen/mean"]


def test_a_run_without_ray_gives_the_numbers_of_a_run_with_it(long_run: Run, long_run_here: Run) -> None:
    """What the other tests learn from runs in one process holds for the real thing, and the seed decides everything."""
    for step, row in long_run.steps.items():
        assert long_run_here.answers(step) == long_run.answers(step), f"step {step}"
        assert differences(long_run_here.steps[step], row, 1e-6) == [], f"step {step}"


def test_the_micro_batch_size_changes_no_answer_and_no_metric(
    work: Path, data: Data, start: Path, long_run_here: Run
) -> None:
    """Invariant 2 for the whole loop; the smallest budget cuts every group into single answers.

    One step, of two optimizer steps. Sums in another order differ in the last digit, AdamW takes first the signs
    of the gradients, and a draw of the next step may lie between the two: its answers are no invariant.
    """
    folder = work / "small_micro_batches"
    sizes = [f"actor_rollout_ref.{node}micro_batch_size_per_gpu=1" for node in ("actor.ppo_", "rollout.log_prob_")]
    sizes += ["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1", "actor_rollout_ref.rollout.hf_batch_size=4"]
    run = rl_here(rl_overrides(data, start, folder, *LONG_RUN, *sizes, *stop_after(1)), folder).ok()
    assert run.answers(1) == long_run_here.answers(1)
    assert differences(spreadless(run.steps[1]), without_saves(long_run_here.steps[1]), 1e-4) == []


def test_another_seed_gives_other_answers_and_other_rows(
    work: Path, data: Data, start: Path, long_run_here: Run
) -> None:
    folder = work / "other_seed"
    run = rl_here(rl_overrides(data, start, folder, *LONG_RUN, *stop_after(1), "trainer.seed=2"), folder).ok()
    assert set(rows_seen(run, 1)) != set(rows_seen(long_run_here, 1))
    same_rows = rl_overrides(data, start, work / "seed3", *LONG_RUN, *stop_after(1), "actor_rollout_ref.rollout.seed=3")
    other_noise = rl_here(same_rows, work / "seed3").ok()
    assert rows_seen(other_noise, 1) == rows_seen(long_run_here, 1)
    assert other_noise.answers(1) != long_run_here.answers(1)


def test_invariant_4_a_resumed_run_equals_an_uninterrupted_one_exactly(resumed: Run, long_run_here: Run) -> None:
    """Invariant 4 on the same world size: every metric and every answer, bit for bit, validation included."""
    for step in (4, 5, 6):
        assert resumed.answers(step) == long_run_here.answers(step), f"step {step}"
        assert differences(resumed.steps[step], long_run_here.steps[step]) == [], f"step {step}"


def test_a_resumed_run_leaves_the_weights_of_an_uninterrupted_one(resumed: Run, long_run_here: Run) -> None:
    mine, theirs = (run.checkpoint(6) / "actor/huggingface/model.safetensors" for run in (resumed, long_run_here))
    assert mine.read_bytes() == theirs.read_bytes(), f"{mine} and {theirs} differ"


def test_a_resumed_run_continues_its_files_and_says_where_it_started(resumed: Run) -> None:
    assert [row["step"] for row in resumed.rows] == [0, 1, 2, 3, 4, 5, 6]
    assert f"resumed {resumed.checkpoint(3)}" in resumed.out


def test_an_older_checkpoint_of_one_rank_continues_on_two_within_1e_6(resumed_on_two_ranks: Run, long_run: Run) -> None:
    """Invariant 4 on another world size: the answers are the same, the numbers agree within 1e-6 a step."""
    assert resumed_on_two_ranks.answers(4) == long_run.answers(4)
    found, expected = (without_saves(run.steps[4]) for run in (resumed_on_two_ranks, long_run))
    assert differences(found, expected, 1e-6) == []


def test_rows_and_epochs_of_a_resumed_run_go_on_over_the_edge_of_an_epoch(
    work: Path, data: Data, start: Path, long_run_here: Run
) -> None:
    """32 rows are 8 steps: from step 3 into the second epoch, each row once an epoch, to the end that epochs give."""
    folder = work / "epochs"
    named = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={long_run_here.checkpoint(3)}"]
    length = ["trainer.total_training_steps=null", "trainer.total_epochs=2", "trainer.save_freq=8"]
    overrides = rl_overrides(data, start, folder, *LONG_RUN, *length, "trainer.test_freq=-1", *named)
    run = rl_here(overrides, folder).ok()
    assert list(run.steps) == list(range(4, 17))
    first = [uid for step in (1, 2, 3) for uid in rows_seen(long_run_here, step)]
    first += [uid for step in range(4, 9) for uid in rows_seen(run, step)]
    second = [uid for step in range(9, 17) for uid in rows_seen(run, step)]
    assert (len(set(first)), len(set(second)), len(second)) == (32, 32, 32)
    assert {row["training/epoch"] for step, row in run.steps.items() if step <= 8} == {0.0}
    assert {row["training/epoch"] for step, row in run.steps.items() if step > 8} == {1.0}
    # The checkpoint of the epoch's last step continues with the second epoch.
    again = work / "epoch_edge"
    named[1] = f"trainer.resume_from_path={run.checkpoint(8)}"
    after = rl_here(rl_overrides(data, start, again, *LONG_RUN, *stop_after(9), *named), again).ok()
    assert rows_seen(after, 9) == rows_seen(run, 9)


def test_a_finished_run_that_is_started_again_trains_no_further(
    work: Path, data: Data, start: Path, resumed: Run
) -> None:
    before = read_lines(resumed.folder / "metrics.jsonl")
    run = rl_here(rl_overrides(data, start, resumed.folder, *LONG_RUN), resumed.folder).ok()
    assert f"resumed {resumed.checkpoint(6)}" in run.out
    assert [row["step"] for row in run.rows] == [row["step"] for row in before]


@pytest.mark.parametrize("changed", ["model", "data"])
def test_resume_refuses_a_checkpoint_of_another_model_or_data_naming_both(
    work: Path, data: Data, start: Path, tiny: Path, long_run_here: Run, changed: str
) -> None:
    folder = long_run_here.folder
    model, extra = (tiny, []) if changed == "model" else (start, [f"data.train_files={data.file('test')}"])
    before = sorted(path.name for path in folder.iterdir())
    run = rl_here(rl_overrides(data, model, folder, *LONG_RUN, *extra), folder)
    assert run.code == 2, run.err
    (line,) = [line for line in run.err.splitlines() if line.startswith("error: ")]
    names = ("actor_rollout_ref.model.path", str(start), str(tiny)) if changed == "model" else ("data.train_files",)
    assert all(name in line for name in (*names, "trainer.resume_mode=disable")), line
    assert sorted(path.name for path in folder.iterdir()) == before
    assert "Traceback" not in run.err, run.err


def test_a_new_run_in_an_old_folder_reports_its_own_checkpoint(
    work: Path, data: Data, start: Path, long_run_here: Run
) -> None:
    """An older run's best record must not decide what the new one keeps or reports."""
    folder = work / "old_folder"
    folder.mkdir()
    shutil.copytree(long_run_here.checkpoint(6), folder / "global_step_6")
    (folder / "latest_checkpointed_iteration.txt").write_text("6")
    (folder / "best_checkpoint.json").write_text('{"step": 6, "metric": "val/accuracy", "value": 1.0}')
    extra = [
        "trainer.resume_mode=disable",
        *stop_after(1),
        "trainer.test_freq=1",
        f"data.test_files={data.file('val')}",
    ]
    extra += [f"data.val_files={data.file('test')}"]
    run = rl_here(rl_overrides(data, start, folder, *LONG_RUN, *extra), folder).ok()
    assert run.report("test")["weights"] == "global_step_1"
