"""Placements of several GPUs, on a CPU: one engine over two ranks, and actor and rollout apart.

The program is that of GPUs, with gloo and mapped files for NCCL and CUDA IPC. Two engines of one rank each, colocated
with two actor ranks: `test_vllm_run.py`. On two GPUs: `tests/gpu/test_two_gpus.py`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from runs import Data, Launcher, Run, Started, kill, rl_overrides
from vllm_host import VLLM_SIZE, vllm_path

from verl.models.tiny import create_tiny_model, texts_of_parquet

ROLLOUT = "actor_rollout_ref.rollout"
MOVES = "actor_rollout_ref.actor.entropy_coeff=0.5"  # weights move whatever the scores
CHECKED = ("trainer.device=auto", "trainer.test_freq=1", MOVES)
TOGETHER = (f"{ROLLOUT}.name=vllm", "trainer.n_gpus_per_node=2", *CHECKED)
SPLIT = ("actor_rollout_ref.hybrid_engine=False", f"{ROLLOUT}.nnodes=1", *CHECKED)


@pytest.fixture(scope="module")
def model(work: Path, data: Data) -> Path:
    create_tiny_model(work / "placements", texts_of_parquet([Path(data.file("sft_fit"))]), size=VLLM_SIZE, seed=0)
    return work / "placements"


@pytest.fixture(autouse=True)
def no_shared_memory_of_a_killed_engine() -> None:
    """vLLM on CPU names the shared memory of two ranks alike in every run, and refuses one that a killed run left."""
    for left in Path("/dev/shm").rglob("*cpushm_*"):
        left.unlink()


def started(launcher: Launcher, overrides: list[str], folder: Path) -> Started:
    script = str(Path(__file__).with_name("gpu_placements.py"))
    hidden = {"PYTHONPATH": vllm_path(), "CUDA_VISIBLE_DEVICES": ""}
    return Started([sys.executable, script, *overrides], folder, launcher.env | hidden)


def run(launcher: Launcher, overrides: list[str], folder: Path) -> Run:
    with started(launcher, overrides, folder) as begun:
        return begun.wait().ok()


def assert_synced(run: Run, *, canary: bool = True) -> None:
    """Both steps answered with the actor's weights, which have moved between them; `canary`: the engines are vLLM's."""
    assert ("canary (" in run.out) is canary
    assert sorted(run.steps) == [1, 2]
    for step, row in run.steps.items():
        if canary:
            assert row["canary/logprob_diff_max"] <= 1e-3, (step, row["canary/logprob_diff_max"])
        assert row["training/rollout_probs_diff_max"] <= 1e-3, (step, row["training/rollout_probs_diff_max"])
        assert row["actor/grad_norm"] > 0, step


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ranks"), [("hf", 1), ("vllm", 2)])
def test_actors_and_engines_apart_meet_in_a_broadcast(
    engine: str, ranks: int, work: Path, data: Data, model: Path, launcher: Launcher
) -> None:
    folder = work / f"apart_{engine}"
    sizes = (f"trainer.n_gpus_per_node={ranks}", f"{ROLLOUT}.n_gpus_per_node={ranks}", f"{ROLLOUT}.name={engine}")
    overrides = rl_overrides(data, model, folder, *SPLIT, *sizes, "trainer.total_training_steps=2")
    assert_synced(run(launcher, overrides, folder), canary=engine == "vllm")


@pytest.mark.slow
def test_an_engine_over_two_ranks_answers_as_two_engines_do_and_takes_every_update(
    work: Path, data: Data, model: Path, launcher: Launcher
) -> None:
    found = {}
    for tp in (1, 2):
        folder = work / f"tp{tp}"
        extra = (*TOGETHER, f"{ROLLOUT}.tensor_model_parallel_size={tp}", "trainer.total_training_steps=2")
        found[tp] = run(launcher, rl_overrides(data, model, folder, *extra), folder)
        assert_synced(found[tp])
    # Noise of an answer is a function of its name, so fp32 engines that hold the same weights write the same.
    first, other = found[1].answers(1), found[2].answers(1)
    assert first and first == other


@pytest.mark.slow
def test_a_killed_rank_of_an_engine_ends_the_run_and_is_named(
    work: Path, data: Data, model: Path, launcher: Launcher
) -> None:
    folder = work / "tp_killed"
    extra = (*TOGETHER, f"{ROLLOUT}.tensor_model_parallel_size=2", "trainer.total_training_steps=500")
    with started(launcher, rl_overrides(data, model, folder, *extra), folder) as begun:
        _, second = begun.worker_pids("rollout")
        begun.until(lambda: (folder / "metrics.jsonl").is_file(), "first step")
        kill(second)
        ended = begun.wait()
    assert ended.code not in (0, 2)
    assert re.search(r"rollout rank 1 died during '[\w.]+'", ended.out), ended.out[-3000:]
