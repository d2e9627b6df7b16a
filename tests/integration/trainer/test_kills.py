"""`kill -9` of real runs: what is on the disk afterwards (invariant 5), and how the run goes on (invariant 4)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from in_process import rl_here, sft_here
from runs import (
    LONG_RUN,
    ROOT,
    Data,
    Launcher,
    Run,
    begin_at,
    differences,
    kill,
    loadable,
    pointer,
    rl_overrides,
    sft_overrides,
    whole_checkpoints,
)

from verl.utils.checkpoint.manager import LOCK, POINTER, CheckpointManager

HERE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Case:
    """A run that goes on from step 3 and is killed at a point of a later one."""

    hold: str
    """See `held_worker`."""
    driver: bool
    """Kill the driver; False: the worker that stopped."""
    last: int
    """The checkpoint that must be found."""
    dies_in: str
    """What the driver says of a worker that died."""

    def __str__(self) -> str:
        return f"{'driver' if self.driver else 'worker'}-{self.hold.partition(':')[0]}"


# Two optimizer steps a step: step 5 holds the optimizer steps 8 and 9.
CASES = [
    Case("save", True, 3, ""),
    Case("update:9", False, 4, "actor rank 0 died during 'update'"),
]
MORE = [
    Case("save", False, 3, "actor rank 0 died during 'save'"),
    Case("update:9", True, 4, ""),
    Case("generate:5", False, 4, "rollout rank 0 died during 'generate'"),
]


def held(hold: str, mark: Path) -> dict[str, str]:
    """Environment of a run that stops at a point."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), HERE]),
        "TIMEMASTER_HOLD": hold,
        "TIMEMASTER_HELD": str(mark),
    }


@dataclass(frozen=True)
class Killed:
    """A killed run and the case it was."""

    case: Case
    run: Run
    files: tuple[str, ...]
    """What lay in the run folder when all its processes had ended."""


@pytest.fixture(scope="module", params=[*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=str)
def killed(
    request: pytest.FixtureRequest, work: Path, data: Data, start: Path, launcher: Launcher, long_run_here: Run
) -> Killed:
    case: Case = request.param
    folder = begin_at(work / f"killed-{case}", long_run_here, 3)
    mark = work / f"{folder.name}.held"
    extra = ["actor_rollout_ref.model.external_lib=held_worker", "trainer.save_freq=4"]
    overrides = rl_overrides(data, start, folder, *LONG_RUN, *extra)
    with launcher.start("main_ppo", overrides, folder, **held(case.hold, mark)) as running:
        running.until(mark.exists, case.hold)
        kill(running.process.pid if case.driver else int(mark.read_text()))
        run = running.wait()
    return Killed(case, run, tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())))


def test_invariant_5_a_kill_9_leaves_the_last_checkpoint_whole_and_loadable(killed: Killed) -> None:
    folder, last = killed.run.folder, killed.case.last
    assert (pointer(folder), whole_checkpoints(folder)) == (last, sorted({3, last}))
    for step in {3, last}:
        found = CheckpointManager(folder).find(str(folder / f"global_step_{step}"))
        assert found is not None and loadable(found)["engine"]["steps"] == 2 * step
    latest = CheckpointManager(folder).find("auto")
    assert latest is not None and latest.step == last


def test_a_kill_9_ends_the_run_and_a_dead_worker_is_named_with_its_phase(killed: Killed) -> None:
    assert killed.run.code == (-signal.SIGKILL if killed.case.driver else 1), killed.run.out[-4000:]
    assert killed.case.dies_in in killed.run.out
    half = ".tmp-global_step_4"
    if killed.case.hold == "save" and killed.case.driver:
        assert half in killed.files, "the driver was killed in the middle of a save"
    else:
        assert half not in killed.files, "a driver that lives on leaves no half checkpoint"


def test_invariant_4_after_a_kill_9_the_run_continues_as_if_never_stopped(
    killed: Killed, data: Data, start: Path, long_run_here: Run
) -> None:
    folder = killed.run.folder
    run = rl_here(rl_overrides(data, start, folder, *LONG_RUN), folder).ok()
    assert f"resumed {folder / f'global_step_{killed.case.last}'}" in run.out
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 4, 5, 6]
    for step in (4, 5, 6):
        assert run.answers(step) == long_run_here.answers(step), f"step {step}"
        assert differences(run.steps[step], long_run_here.steps[step]) == [], f"step {step}"
    mine, theirs = (r.checkpoint(6) / "actor/huggingface/model.safetensors" for r in (run, long_run_here))
    assert mine.read_bytes() == theirs.read_bytes(), "the weights differ"
    left = [path.name for path in folder.glob(".*") if path.name != LOCK]  # the lock file stays, free
    assert not left, f"leftovers of the kill: {left}"


SFT = ("trainer.total_training_steps=5", "trainer.save_freq=2", "trainer.test_freq=-1", "trainer.seed=3")


def test_invariants_4_and_5_of_supervised_training_killed_during_a_save(
    work: Path, data: Data, tiny: Path, launcher: Launcher
) -> None:
    whole = sft_here(sft_overrides(data, tiny, work / "sft_whole", *SFT), work / "sft_whole").ok()
    folder, mark = work / "sft_killed", work / "sft_killed.held"
    begin_at(folder, whole, 2)
    overrides = sft_overrides(data, tiny, folder, *SFT, "model.external_lib=held_worker")
    with launcher.start("sft_trainer", overrides, folder, **held("save", mark)) as running:
        running.until(mark.exists, "the save of step 4")
        kill(running.process.pid)
        assert running.wait().code == -signal.SIGKILL
    assert (pointer(folder), whole_checkpoints(folder)) == (2, [2])
    found = CheckpointManager(folder).find("auto")
    assert found is not None and loadable(found)["engine"]["steps"] == 2

    again = sft_here(sft_overrides(data, tiny, folder, *SFT), folder).ok()
    assert steps_of(again, 3) == steps_of(whole, 3)
    mine, theirs = (run.checkpoint(5) / "actor/huggingface/model.safetensors" for run in (again, whole))
    assert mine.read_bytes() == theirs.read_bytes(), "the weights differ"


def steps_of(run: Run, first: int) -> list[tuple[float, ...]]:
    """What identifies the steps from `first` on."""
    names = ("train/loss", "train/grad_norm", "train/lr", "training/epoch")
    return [(step, *(row[name] for name in names)) for step, row in run.steps.items() if step >= first]


def newest(folder: Path) -> int:
    return pointer(folder) if (folder / POINTER).exists() else 0


MANY = ("trainer.total_training_steps=12", "trainer.save_freq=1", "trainer.test_freq=4", "trainer.keep_best=False")
ATTEMPTS = 16


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_invariants_4_and_5_hold_over_many_kills_at_any_moment(
    work: Path, data: Data, start: Path, launcher: Launcher, ranks: int
) -> None:
    """Kills of driver and workers at random times, until an attempt reaches the end; at most two checkpoints stay."""
    extra = [*LONG_RUN, *MANY, f"trainer.n_gpus_per_node={ranks}"]
    folder = work / f"many_whole_{ranks}"
    whole = launcher.run("main_ppo", rl_overrides(data, start, folder, *extra), folder).ok()
    folder, rng, seen = work / f"many_kills_{ranks}", random.Random(ranks), {0}
    overrides = rl_overrides(data, start, folder, *extra, "trainer.max_actor_ckpt_to_keep=2")
    for _ in range(ATTEMPTS):
        with launcher.start("main_ppo", overrides, folder) as running:
            pids = [running.process.pid, *running.worker_pids("actor"), *running.worker_pids("rollout")]
            # Every attempt gets somewhere, however slow the machine is.
            running.until(lambda: newest(folder) > max(seen), f"a checkpoint after step {max(seen)}", pause=0.01)
            time.sleep(rng.uniform(0, 4))
            with contextlib.suppress(ProcessLookupError):
                kill(rng.choice(pids))
            code = running.wait().code
        latest = CheckpointManager(folder).find("auto")
        assert latest is None or loadable(latest)["engine"]["steps"] == 2 * latest.step
        seen.add(0 if latest is None else latest.step)
        assert max(seen) == (0 if latest is None else latest.step), f"a later checkpoint is gone: {sorted(seen)}"
        if code == 0 or (latest is not None and latest.step == 12):
            break
    run = launcher.run("main_ppo", overrides, folder).ok()
    assert len(seen) > 2, f"the kills hit only at {sorted(seen)}"
    assert [row["step"] for row in run.rows] == list(range(13))
    for step, row in whole.steps.items():
        assert run.answers(step) == whole.answers(step), f"step {step}"
        assert differences(run.steps[step], row) == [], f"step {step}"
    assert whole_checkpoints(folder) == [11, 12]
