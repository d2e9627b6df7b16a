"""What a config makes a run of ppo_trainer do: the program itself, with models, Ray and files written down instead.

The code that reads the config is the real one, from `Trainer` to the workers' constructors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
from compat_recorder import Calls, quiet, run_folder

from verl.config import PPOConfig
from verl.protocol import Group, LogProbs, Prompt, Response, Score, StopReason
from verl.trainer.ppo import cluster
from verl.trainer.ppo.workers import Actors
from verl.trainer.ray_trainer import Trainer
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.rl_dataset import RLDataset
from verl.workers.actor.optim import OptimSpec, lr_factor
from verl.workers.actor.worker import ActorWorker
from verl.workers.rollout.worker import Place, build_engine

_STEP = 3
_ROWS = 20
_SOURCE = "computer_dataset"
_SAMPLED = 0.1
"""Distance between the sampler's log-probs and the policy's."""
SPEC = ImageSpec()


def prompt(row: int) -> Prompt:
    return Prompt(f"row-{row}", row, _SOURCE, np.arange(4 + row % 7, dtype=np.int32), (), (), "Desktop")


def dataset(*_: Any) -> RLDataset:
    return RLDataset(tuple(map(prompt, range(_ROWS))), None, 0, "digest")


def answers(prompts: Sequence[Prompt], n: int) -> list[Group]:
    """`n` answers each: lengths and scores differ, and not by their mean alone."""
    groups = []
    for p in prompts:
        responses = []
        for i in range(n):
            length = 2 + (3 * p.row + i) % 5
            ids, sampled = np.arange(length, dtype=np.int32), log_probs(length) - _SAMPLED * (i + 1)
            responses.append(Response(ids, sampled.astype(np.float32), StopReason.EOS))
        scores = [Score.ok(float((p.row * i) % 4) + 0.5 * i, prediction="Desktop") for i in range(n)]
        groups.append(Group(p, tuple(responses), tuple(scores)))
    return groups


def log_probs(length: int, last: float = -0.5) -> LogProbs:
    return np.linspace(-1, last, length).astype(np.float32)


class Ranks:
    """Two ranks of an actor that note its work."""

    size = 2
    several_nodes = False

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def each(self, method: str, shares: Sequence[Any]) -> list[Any]:
        self.calls.to(f"actor.{method}")(shares)
        if method == "update":
            return [[{"grad_norm": 1.0, "lr": 1.0, "skipped": 0.0} for _ in share[0]] for share in shares]
        last = -0.8 if method == "ref_log_probs" else -0.5
        samples = [[s for micro in share[0] for group in micro for s in group.samples] for share in shares]
        return [{s.index: log_probs(len(s.token_ids), last) for s in of_rank} for of_rank in samples]

    def all(self, method: str, *args: Any) -> list[Any]:
        return [self.calls.to(f"actor.{method}", "x")(*args)] * self.size


def ppo_effects(config: PPOConfig) -> dict[str, Any]:
    """By phase of a run, what is asked of the parts that were replaced."""
    phases = {}
    for phase in (_run, of_workers, _actor, of_engine):
        calls = Calls()
        with quiet():
            phase(config, calls)
        phases[phase.__name__] = calls.made
    return phases


def _run(config: PPOConfig, calls: Calls) -> None:
    """Read the data, train from the first step to the last, and once look into a step."""
    with run_folder(calls) as folder, _driver(calls):
        run = Trainer(config)
        run.run_dir = folder
        run.scorer = _scorer(calls)
        if config.trainer.val_only:
            run.fit()
            return
        real_step = run._step
        run._step = lambda: {"critic/score/mean": 0.0}
        run.fit()
        run.step = _STEP
        run.workers.actors = Actors(Ranks(calls), config)
        run._metrics = lambda *_: {}
        for _ in range(2):  # an adaptive KL coefficient moves after a step
            real_step()


@contextlib.contextmanager
def _driver(calls: Calls) -> Iterator[None]:
    manager = MagicMock(find=calls.to("find", lambda *_: None), would_be_best=lambda _: False, keep_best=None)
    manager.saving = calls.to("saving")
    workers = MagicMock(device="cpu")
    workers.sync = calls.to("sync", {})
    workers.rollouts.generate = calls.to("generate")
    tracker = MagicMock(log=MagicMock(), log_samples=calls.to("log_samples"))
    data = calls.replacing(
        "verl.trainer.ppo.data",
        "model_config",
        "open_tokenizer",
        check_model_folder=Path("model"),
        load_rl_dataset=dataset,
    )
    loop = calls.replacing(
        "verl.trainer.ray_trainer",
        "check_scorable",
        "Canary",
        "check_model_folder",
        CheckpointManager=lambda *_, **__: manager,
        Tracker=lambda *_, **__: tracker,
        start_workers=lambda *_, **__: workers,
        run_identity={},
        to_dict={},
        to_yaml="",
    )
    with data, loop, of_images(calls), of_rewards(calls):
        yield


def of_images(calls: Calls) -> contextlib.ExitStack:
    return calls.replacing("verl.utils.dataset.images.ImageSpec", from_pretrained=SPEC)


def of_tokenizer(calls: Calls) -> contextlib.ExitStack:
    return calls.replacing("transformers.AutoTokenizer", "from_pretrained")


def of_rewards(calls: Calls) -> contextlib.ExitStack:
    return calls.replacing("verl.trainer.ppo.scoring", "RewardManager", "CustomFunction")


def _scorer(calls: Calls) -> Any:
    """Gives every prompt three answers of its own, whatever an engine returned."""

    def begin(prompts: Sequence[Prompt]) -> Any:
        return SimpleNamespace(sink=None, finish=lambda _: answers(prompts, 3))

    noted = {"write_samples": calls.to("write_samples"), "tracker_samples": calls.to("tracker_samples", [])}
    return MagicMock(begin=begin, **noted)


def of_workers(config: PPOConfig, calls: Calls) -> None:
    """Ray, the places and sizes of worker groups, on GPUs."""
    silent = ("WorkerGroup", "Workers", "check_shared", "RewardPool")
    start = calls.replacing(
        "verl.trainer.ppo.cluster",
        *silent,
        reserve=MagicMock(nodes=()),
        check_model_folder=Path("model"),
        resolve_device="cuda",
        _decide_memory=lambda config, *_: config,
    )
    with start, calls.replacing("ray", "init", is_initialized=False):
        cluster.start_workers(config, [], 10, MagicMock())


def _actor(config: PPOConfig, calls: Calls) -> None:
    """One rank of the actor on a GPU, with switches on auto decided as a small model would have them."""
    silent = ("start_process_group", "import_external", "open_patches", "WeightSender", "Merger")
    found = {"resolve_device": "cuda", "check_model_folder": Path("model")}
    worker = calls.replacing("verl.workers.actor.worker", *silent, **found)
    with worker, of_build(calls), of_images(calls), of_tokenizer(calls):
        made = ActorWorker(cluster.without_plan(config), 0, 1, ("host", 1), [], 100)
    calls.made += [("objective", repr(made.objective)), ("reference", made.reference is not None)]
    calls.made.append(("schedule", schedule_of(calls)))


@contextlib.contextmanager
def of_build(calls: Calls) -> Iterator[None]:
    """The way from config nodes to a sharded model, without a model."""
    silent = ("choose_trained", "load_adapter", "build_mesh", "TrainEngine", "PackedRunner")
    found = {"load_policy": _policy, "shard": _policy, "read_spec": MagicMock(rank=4), "reads_from_disk": True}
    with (
        calls.replacing("verl.workers.actor.build", *silent, **found),
        calls.replacing("torch.cuda", current_device=0),
    ):
        yield


def _policy(*_: Any, **__: Any) -> Any:
    return MagicMock(named_buffers=lambda: [], lora=None)


def schedule_of(calls: Calls) -> list[float]:
    """Factors of the learning rate over a hundred steps."""
    values = next(args[1]["OptimSpec"] for name, args, _ in calls.made if name == "TrainEngine")
    return [lr_factor(step, OptimSpec(**values)) for step in range(100)]


def of_engine(config: PPOConfig, calls: Calls, *, waits_for_weights: bool = True) -> None:
    """An engine on a GPU."""
    silent = ("import_external", "open_patches", "load_policy", "HFEngine", "VLLMEngine", "model_facts", "stop_ids")
    found = {"resolve_device": "cuda", "check_model_folder": Path("model")}
    worker = calls.replacing("verl.workers.rollout.worker", *silent, **found)
    with worker, of_images(calls), of_tokenizer(calls):
        build_engine(config, [], Place(), waits_for_weights=waits_for_weights)
