"""Runs of the entry points: how they are started, what they leave behind, and how they are killed.

A run is a subprocess (with Ray, as a user starts it) or happens in the test's own process (`in_process.py`). Processes
are found by the session that `Popen` opened for them, so a test can never reach a neighbour's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from verl.models.tiny import TinySize
from verl.utils.checkpoint.manager import MANIFEST, POINTER, Checkpoint, verify
from verl.utils.checkpoint.sharded import load_sharded, model_state, stored_tensors

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 600.0  # seconds for one run of a few steps on a busy machine

CLOCKS = ("timing_s/", "timing_per_token_ms/", "perf/", "time", "reward/pool/")
"""Metrics that differ from run to run whatever the seed."""


SIZE = TinySize(
    hidden=64, layers=2, mlp=128, vision_hidden=64, vision_layers=2, vision_mlp=128, max_vocabulary=400, context=512
)

LONG_RUN = (
    "trainer.total_training_steps=6",
    "trainer.save_freq=3",
    "trainer.test_freq=3",
    "trainer.val_before_train=True",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.01",
    "actor_rollout_ref.actor.optim.warmup_style=cosine",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=4",
    "actor_rollout_ref.actor.optim.min_lr_ratio=0.1",
    "actor_rollout_ref.rollout.val_kwargs.temperature=0.4",
    "actor_rollout_ref.rollout.val_kwargs.n=2",
)
"""6 steps of 2 optimizer steps; 32 rows make 8 steps an epoch."""


@dataclass(frozen=True)
class Data:
    """Parquet files of a bundled task, as the data step wrote them."""

    folder: Path

    def file(self, name: str) -> str:
        return str(self.folder / f"{name}.parquet")

    def edited(self, target: Path, name: str, edit: Callable[[int, dict[str, Any]], None], rows: int = 8) -> str:
        """The first `rows` rows of a file, each passed through `edit(number, row)`, as a new file."""
        table = pq.read_table(self.file(name)).slice(0, rows)
        records = table.to_pylist()
        for number, row in enumerate(records):
            edit(number, row)
        pq.write_table(pa.Table.from_pylist(records, schema=table.schema), target)
        return str(target)


@dataclass(frozen=True)
class Run:
    """What a finished run left behind."""

    code: int
    folder: Path
    out: str
    err: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def ok(self) -> Run:
        assert self.code == 0, f"exit code {self.code}\n{self.out[-4000:]}\n{self.err[-6000:]}"
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """Training steps by number."""
        return {row["step"]: row for row in self.rows if "training/global_step" in row}

    def answers(self, step: int) -> list[dict[str, Any]]:
        """Every group of a step, from `trainer.rollout_data_dir` (see `dump`)."""
        return read_lines(self.folder / "rollouts" / f"step_{step:06d}.jsonl")

    def report(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / "reports" / f"{name}.json").read_text())

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"global_step_{step}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole_checkpoints(folder: Path) -> list[int]:
    return sorted(int(p.parent.name.rsplit("_", 1)[1]) for p in folder.glob(f"global_step_*/{MANIFEST}"))


def pointer(folder: Path) -> int:
    return int((folder / POINTER).read_text())


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its clocks and memory figures."""
    return {name: value for name, value in row.items() if not name.startswith(CLOCKS)}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 0.0) -> list[str]:
    """Metrics that are on one side only, or further apart than `tolerance` (absolute, or relative above 1)."""
    mine, theirs = timeless(found), timeless(expected)
    lines = [f"{name}: on one side only" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        a, b = mine[name], theirs[name]
        if a == b:
            continue
        if not abs(a - b) <= tolerance * max(1.0, abs(b)):
            lines.append(f"{name}: {a!r}, expected {b!r}")
    return lines


def rl_overrides(data: Data, model: Path | str, folder: Path, *extra: str) -> list[str]:
    """A small GRPO run: 4 prompts x 4 answers a step, two optimizer steps, one rank; `extra` wins."""
    return [
        f"data.train_files={data.file('fit')}",
        f"data.val_files={data.file('val')}",
        "data.train_batch_size=4",
        "data.max_prompt_length=96",
        "data.max_response_length=40",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
        "reward.format=strict",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=1",
        "trainer.val_before_train=False",
        "trainer.device=cpu",
        "trainer.logger=[console]",
        f"trainer.default_local_dir={folder}",
        f"trainer.rollout_data_dir={folder}/rollouts",
        *extra,
    ]


def sft_overrides(data: Data, model: Path | str, folder: Path, *extra: str) -> list[str]:
    """A small SFT run on the supervised files; `extra` wins."""
    return [
        f"data.train_files={data.file('sft_fit')}",
        f"data.val_files={data.file('sft_val')}",
        "data.train_batch_size=8",
        "data.micro_batch_size_per_gpu=8",
        "data.max_length=160",
        "data.max_prompt_length=96",
        "data.max_response_length=40",
        f"model.partial_pretrain={model}",
        "optim.lr=3e-3",
        "optim.lr_scheduler=constant",
        "rollout.do_sample=True",
        "rollout.temperature=0.4",
        "reward.format=strict",
        "trainer.device=cpu",
        f"trainer.default_local_dir={folder}",
        *extra,
    ]


class Started:
    """A running entry point with everything it started; leaving the `with` block ends them all."""

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str], cwd: Path = ROOT) -> None:
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.log")
        self._file = self.log.open("w")
        self.process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **env}, stdout=self._file, stderr=self._file, start_new_session=True
        )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(3):  # a dying parent may just have started another
            for member in self.members():
                with contextlib.suppress(psutil.Error):
                    member.kill()
        self.process.wait()
        self._file.close()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def members(self) -> list[psutil.Process]:
        """Living processes of this run, the entry point among them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def until(self, condition: Callable[[], Any], what: str, pause: float = 0.05) -> Any:
        """Wait until `condition()` is true while the run lives; its value."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if value := condition():
                return value
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.text[-6000:]}"
            time.sleep(pause)
        raise AssertionError(f"no {what} within {PATIENCE:.0f} s:\n{self.text[-6000:]}")

    def worker_pids(self, group: str) -> list[int]:
        """Pids of a worker group, which the run prints when all have started."""
        pattern = re.compile(rf"^workers:.*\b{group} pid ([\d, ]+)", re.M)
        match = self.until(lambda: pattern.search(self.text), f"pids of the {group} workers")
        return [int(pid) for pid in match[1].split(",")]

    def wait(self) -> Run:
        """The finished run. Asserts that its processes end with it."""
        code = self.process.wait(timeout=PATIENCE)
        end = time.monotonic() + PATIENCE
        while (left := self.members()) and time.monotonic() < end:
            time.sleep(0.1)
        names = [" ".join(p.cmdline())[:100] for p in left if p.is_running()]
        assert not names, f"left behind by {self.folder.name}: {names}"
        return Run(code, self.folder, self.text)


def loadable(checkpoint: Checkpoint) -> dict[str, Any]:
    """The json state of a checkpoint, all of whose files are there and load, the export with the shards' weights."""
    verify(checkpoint)
    assert stored_tensors(checkpoint.optimizer), f"{checkpoint.optimizer} is empty"
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint.huggingface, dtype=torch.float32)
    stored = {name: torch.empty_like(value) for name, value in model_state(plain).items()}
    load_sharded(checkpoint.model, stored)
    different = [name for name, value in model_state(plain).items() if not torch.equal(value, stored[name])]
    assert different == [], f"{checkpoint.path}: export and shards differ"
    return checkpoint.read_data()


def begin_at(folder: Path, run: Run, step: int) -> Path:
    """A new run folder that holds what `run` had left when it was stopped after `step`."""
    folder.mkdir()
    shutil.copytree(run.checkpoint(step), folder / f"global_step_{step}")
    (folder / POINTER).write_text(str(step))
    shutil.copy(run.folder / "metrics.jsonl", folder)
    return folder


class Launcher:
    """Starts entry points as a user does, each with a Ray of its own in `ray_dir`."""

    def __init__(self, ray_dir: Path) -> None:
        self.env = {
            "RAY_TMPDIR": str(ray_dir),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Or Ray ends our workers when somebody else fills the machine's memory.
            "RAY_memory_monitor_refresh_ms": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "COLUMNS": "120",
        }

    def start(self, module: str, overrides: Sequence[str], folder: Path, **env: str) -> Started:
        return Started([sys.executable, "-m", f"verl.trainer.{module}", *overrides], folder, self.env | env)

    def run(self, module: str, overrides: Sequence[str], folder: Path, **env: str) -> Run:
        with self.start(module, overrides, folder, **env) as started:
            return started.wait()

    def torchrun(self, ranks: int, overrides: Sequence[str], folder: Path, module: str = "sft_trainer") -> Run:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with Started([*launcher, "-m", f"verl.trainer.{module}", *overrides], folder, self.env) as started:
            return started.wait()

    def start_torchrun_node(self, node: int, nodes: int, port: int, overrides: Sequence[str], folder: Path) -> Started:
        """One node of several, with one rank; all are on this machine."""
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={node}"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={port}", "--nproc-per-node=1"]
        return Started([*launcher, "-m", "verl.trainer.sft_trainer", *overrides], folder, self.env)

    def script(self, path: str, arguments: Sequence[str], folder: Path, **env: str) -> Run:
        """A shell script of the repository, with the tests' interpreter as python3."""
        bin_dir = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        settings = self.env | {"PATH": bin_dir, "VIRTUAL_ENV": str(Path(sys.prefix)), **env}
        with Started(["bash", path, *arguments], folder, settings) as started:
            return started.wait()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
