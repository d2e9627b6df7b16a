"""Whole runs with vLLM on CPU: the canary, agreement with the actor after every transfer, replicas, a killed engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import Data, Launcher, Run, kill, rl_overrides, whole_checkpoints
from transformers import Qwen2_5_VLForConditionalGeneration
from vllm_host import VLLM_SIZE, vllm_path

from verl.models.tiny import create_tiny_model, texts_of_parquet

VLLM = (
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.actor.entropy_coeff=0.5",  # so that weights move whatever the scores
    "trainer.save_freq=1",
)


@pytest.fixture(scope="module")
def model(work: Path, data: Data) -> Path:
    create_tiny_model(work / "vllm_run", texts_of_parquet([Path(data.file("sft_fit"))]), size=VLLM_SIZE, seed=0)
    return work / "vllm_run"


@pytest.fixture(scope="module")
def run(work: Path, data: Data, model: Path, launcher: Launcher) -> Run:
    """Two replicas, two steps of two optimizer steps each."""
    folder = work / "vllm_two"
    extra = ("trainer.n_gpus_per_node=2", "trainer.total_training_steps=2", "trainer.test_freq=1")
    return launcher.run(
        "main_ppo", rl_overrides(data, model, folder, *VLLM, *extra), folder, PYTHONPATH=vllm_path()
    ).ok()


def test_the_canary_compares_engine_actor_and_plain_model_on_a_real_plot_before_the_first_step(run: Run) -> None:
    line = next(line for line in run.out.splitlines() if line.startswith("canary ("))
    found = re.findall(
        r"(engine to actor|engine to plain fp32|actor to plain fp32) worst (\S+), mean (\S+?)(?:;|$)", line
    )
    assert [name for name, _, _ in found] == ["engine to actor", "engine to plain fp32", "actor to plain fp32"], line
    assert "1 plot(s)" in line and all(float(worst) <= 1e-3 for _, worst, _ in found), line
    assert run.out.index("canary (") < run.out.index("step 1/2")


def test_after_every_transfer_the_engines_log_probs_are_the_actors(run: Run) -> None:
    for step in (1, 2):
        row = run.steps[step]
        assert row["canary/logprob_diff_max"] <= 1e-3, row["canary/logprob_diff_max"]
        assert row["training/rollout_probs_diff_max"] <= 1e-3, row["training/rollout_probs_diff_max"]
    assert run.steps[1]["actor/grad_norm"] > 0, "nothing was learned, so nothing was transferred"


def test_an_evaluation_of_a_checkpoint_compares_engine_and_actor_before_it_answers(
    run: Run, work: Path, data: Data, model: Path, launcher: Launcher
) -> None:
    folder = work / "vllm_evaluated"
    named = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={run.checkpoint(2)}")
    overrides = rl_overrides(data, model, folder, *VLLM, "trainer.val_only=True", *named)
    done = launcher.run("main_ppo", overrides, folder, PYTHONPATH=vllm_path()).ok()
    line = next(line for line in done.out.splitlines() if line.startswith("canary ("))
    found = dict(re.findall(r"(engine to actor|engine to plain fp32) worst (\S+), mean", line))
    assert len(found) == 2 and all(float(worst) <= 1e-3 for worst in found.values()), line
    assert done.out.index("canary (") < done.out.index("validation: accuracy")


def test_an_argument_that_vllm_does_not_have_ends_the_run_at_its_start_with_rank_and_phase(
    work: Path, data: Data, model: Path, launcher: Launcher
) -> None:
    folder = work / "vllm_nonsense"
    nonsense = "+actor_rollout_ref.rollout.engine_kwargs.vllm.nonsense=1"
    overrides = rl_overrides(data, model, folder, *VLLM, nonsense)
    ended = launcher.run("main_ppo", overrides, folder, PYTHONPATH=vllm_path())
    said = ended.out + ended.err
    assert ended.code != 0, said[-3000:]
    assert re.search(r"rollout rank 0, phase 'start': ValueError", said), said[-3000:]
    assert "engine_kwargs.vllm.nonsense: vLLM" in said and "has no such engine argument" in said, said[-3000:]


def test_a_killed_engine_ends_the_run_with_its_rank_and_phase_and_leaves_a_loadable_checkpoint(
    work: Path, data: Data, model: Path, launcher: Launcher
) -> None:
    folder = work / "vllm_killed"
    overrides = rl_overrides(
        data, model, folder, *VLLM, "trainer.total_training_steps=500", "trainer.max_actor_ckpt_to_keep=2"
    )
    with launcher.start("main_ppo", overrides, folder, PYTHONPATH=vllm_path()) as started:
        (pid,) = started.worker_pids("rollout")
        started.until(lambda: whole_checkpoints(folder), "first checkpoint")
        kill(pid)
        ended = started.wait()
    assert ended.code not in (0, 2)
    assert re.search(r"rollout rank 0 died during '[\w.]+'", ended.out), ended.out[-3000:]
    last = whole_checkpoints(folder)[-1]
    Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / f"global_step_{last}" / "actor" / "huggingface")
