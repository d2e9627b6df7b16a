"""Several nodes: two raylets on one machine train together, wait for each other, and one is killed."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import pytest
from in_process import sft_here
from ray_nodes import free_port, ray_nodes
from runs import (
    LONG_RUN,
    Data,
    Launcher,
    Run,
    loadable,
    pointer,
    rl_overrides,
    sft_overrides,
    whole_checkpoints,
)

from verl.utils.checkpoint.manager import CheckpointManager

TWO_NODES = ("trainer.nnodes=2", "trainer.n_gpus_per_node=1", "trainer.ray_wait_timeout=120")


@pytest.mark.slow
def test_a_run_on_two_nodes_waits_for_the_second_and_ends_with_a_clear_message_when_it_is_killed(
    work: Path, data: Data, start: Path, launcher: Launcher, long_run_here: Run
) -> None:
    """The quickstart recipe with an actor and a rollout rank on each of two nodes."""
    folder = work / "two_nodes"
    length = ("trainer.total_training_steps=500", "trainer.save_freq=1", "trainer.test_freq=-1")
    keep = ("trainer.max_actor_ckpt_to_keep=2", "trainer.keep_best=False", "trainer.val_before_train=False")
    overrides = rl_overrides(data, start, folder, *LONG_RUN, *TWO_NODES, *length, *keep)
    with (
        ray_nodes(launcher, work / "ray_nodes") as nodes,
        launcher.start("main_ppo", overrides, folder, **nodes.env) as running,
    ):
        missing = r"1 of 2 nodes, 1 of 2 CPU ranks: 1 more must join .*; waiting, \d+ of 120 s"
        running.until(lambda: re.search(missing, running.text), "a message that a node is missing")
        second = nodes.join()
        for pids in (running.worker_pids("actor"), running.worker_pids("rollout")):
            assert [node.runs(pid) for node, pid in zip((nodes.head, second), pids, strict=True)] == [True, True]
        # A checkpoint is there, and the next steps are under way.
        running.until(lambda: whole_checkpoints(folder) and pointer(folder) >= 2, "two checkpoints")
        begin = time.monotonic()
        second.kill()
        run = running.wait()
        seconds = time.monotonic() - begin
    print(f"the run ended {seconds:.0f} s after the kill")
    assert (run.code, seconds < 60) == (1, True), f"exit code {run.code} after {seconds:.0f} s\n{run.out[-4000:]}"
    (line,) = [line for line in run.out.splitlines() if line.startswith("error: ")]
    where = re.search(r"^nodes: actor rank 0 on .*, rank 1 on (\S+ \(Ray node \w+\)); rollout rank 0", run.out, re.M)
    assert where is not None, run.out[-4000:]
    assert re.match(rf"error: (actor|rollout) rank 1 on node {re.escape(where[1])} died during '[\w. ]+'", line), line
    assert "\nThe node is lost (" in run.out, run.out[-4000:]
    assert run.answers(1) == long_run_here.answers(1), "sampling depends on where a rank runs"

    latest = CheckpointManager(folder).find("auto")
    assert latest is not None and loadable(latest)["engine"]["steps"] == 2 * latest.step
    shards = [path.name for path in latest.model.glob("*.safetensors")]
    assert len(shards) == 2, f"one file of each rank: {shards}"


def test_a_run_that_waits_in_vain_says_what_is_missing_and_fails(
    work: Path, data: Data, start: Path, launcher: Launcher
) -> None:
    folder = work / "alone"
    overrides = rl_overrides(data, start, folder, *TWO_NODES, "trainer.ray_wait_timeout=3")
    with ray_nodes(launcher, work / "one_ray_node") as nodes:
        run = launcher.run("main_ppo", overrides, folder, **nodes.env)
    assert run.code == 1, run.out
    (line,) = [line for line in run.out.splitlines() if line.startswith("error: ")]
    assert "1 of 2 nodes, 1 of 2 CPU ranks: 1 more must join" in line and "trainer.ray_wait_timeout" in line, line
    assert "Traceback" not in run.out, run.out[-4000:]


SFT = ("trainer.total_training_steps=2", "trainer.save_freq=2", "trainer.test_freq=-1", "trainer.seed=3")


@pytest.mark.slow
def test_supervised_training_runs_on_two_nodes_of_torchrun_and_gives_the_losses_of_one_rank(
    work: Path, data: Data, tiny: Path, launcher: Launcher
) -> None:
    folder, port = work / "sft_two_nodes", free_port()
    overrides = sft_overrides(data, tiny, folder, *SFT)
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(launcher.start_torchrun_node(rank, 2, port, overrides, folder)) for rank in range(2)
        ]
        first, second = (node.wait() for node in started)
    assert (first.code, second.code) == (0, 0), f"{first.out[-3000:]}\n{second.out[-3000:]}"
    assert "2 rank(s) on cpu" in first.out, first.out[:3000]
    here = sft_here(sft_overrides(data, tiny, work / "sft_one", *SFT), work / "sft_one").ok()
    for step, row in here.steps.items():
        assert first.steps[step]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-4), f"step {step}"
    latest = CheckpointManager(folder).find("auto")
    assert latest is not None and loadable(latest)["engine"]["steps"] == 2
    assert len(list(latest.model.glob("*.safetensors"))) == 2, "one file of each rank"
