"""The driver's handles on its workers: plan, dispatch, gather. Every plan is made here: no rank decides for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from verl.config import PPOConfig, token_budgets
from verl.config.derived import sequence_limit, uses_adapters
from verl.models.policy import check_model_folder, model_config
from verl.models.sizes import ModelSizes
from verl.models.trained import TrainedParts
from verl.packing.balance import PATCH_WEIGHT, plan_mini_batch
from verl.protocol import LogProbs, Prompt, Response, TokenIds, TrainGroup
from verl.single_controller.cluster import Resources
from verl.single_controller.group import WorkerGroup
from verl.single_controller.shared import wait_until
from verl.trainer.ppo.batch import response_tokens
from verl.trainer.ppo.mfu import FlopMeter
from verl.utils.checkpoint.manager import Checkpoint
from verl.utils.files import files_in
from verl.utils.flops import FlopCounter, peak_flops
from verl.workers.actor.build import chosen_model
from verl.workers.actor.objective import merge_metrics
from verl.workers.actor.worker import ActorWorker, MiniBatch
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.forward import Sink
from verl.workers.rollout.worker import Place, RolloutWorker

_SEEN_WITHIN = 120.0  # seconds; NFS keeps a listing for up to 60
_SAME_ON_ALL_RANKS = ("grad_norm", "lr", "skipped")


class Actors:
    """FSDP ranks of the actor."""

    def __init__(self, group: WorkerGroup, config: PPOConfig) -> None:
        self.group = group
        self.patch_weight = PATCH_WEIGHT
        """The 3B's before the workers are built, then the model's own."""
        self.balanced = config.trainer.balance_batch
        # A run that only validates needs no budgets, and need not set their keys.
        self.budgets = None if config.trainer.val_only else token_budgets(config)
        self.longest = sequence_limit(config)
        self.loads: list[int] = []
        """Tokens that each rank met in the last update."""
        self.meter: FlopMeter | None = None
        """None before the workers are built."""

    def build(self, config: PPOConfig, resources: Resources, stores: Sequence[Path], optimizer_steps: int) -> None:
        address = self.group.rendezvous()
        ranks = resources.ranks
        self.group.build(
            ActorWorker, [(config, rank, ranks, address, stores, optimizer_steps) for rank in range(ranks)]
        )
        device = self.group.all("device_name")[0]
        peak = None if device is None else peak_flops(device)
        self.meter = FlopMeter(flop_counter(config), peak, ranks)
        self.patch_weight = patch_weight(config)

    def _plan(self, groups: Sequence[TrainGroup], budget: int) -> list[list[list[TrainGroup]]]:
        return plan_mini_batch(
            groups,
            ranks=self.group.size,
            token_budget=budget,
            patch_weight=self.patch_weight,
            balanced=self.balanced,
        )

    def log_probs(self, groups: Sequence[TrainGroup], *, reference: bool) -> dict[int, LogProbs]:
        """Log-probs of every answer by sample index, of the present policy or of the reference."""
        if not groups:
            return {}
        budget: int | None = self.longest  # an evaluation asks for those of the canary, one answer at a time
        if self.budgets is not None:
            budget = self.budgets.ref_log_prob if reference else self.budgets.old_log_prob
        assert budget is not None, "no KL term asks for a reference"
        plan = self._plan(groups, budget)
        if self.meter is not None:
            self.meter.add("actor_infer", groups)
        parts = self.group.each("ref_log_probs" if reference else "log_probs", [(share,) for share in plan])
        return {index: values for part in parts for index, values in part.items()}

    def update(self, mini_batches: Sequence[Sequence[TrainGroup]]) -> list[dict[str, float]]:
        """One optimizer step per mini-batch; metric sums over all ranks."""
        assert self.budgets is not None, "a run that only validates updates nothing"
        plans = [self._plan(groups, self.budgets.update) for groups in mini_batches]
        tokens = [response_tokens(groups) for groups in mini_batches]
        self.loads = [sum(packed_tokens(micro) for p in plans for micro in p[rank]) for rank in range(self.group.size)]
        shares = [
            ([MiniBatch(plan[rank], count) for plan, count in zip(plans, tokens, strict=True)],)
            for rank in range(self.group.size)
        ]
        if self.meter is not None:
            for groups in mini_batches:
                self.meter.add("actor", groups)
        by_rank = self.group.each("update", shares)
        steps = []
        for number in range(len(mini_batches)):
            parts = [metrics[number] for metrics in by_rank]
            merged = merge_metrics(parts)
            steps.append(merged | {name: parts[0][name] for name in _SAME_ON_ALL_RANKS})
        return steps

    def save(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Write into the checkpoint's folder; the engine's clock, to be stored beside.

        The driver lists the files for the manifest, so it waits until it sees those that other nodes wrote.
        """
        clock = self.group.all("save", checkpoint)[0]
        if self.group.several_nodes:
            wait_for_files(checkpoint.path, self.group.all("written", checkpoint))
        return clock

    def load(self, checkpoint: Checkpoint, clock: dict[str, int] | None = None) -> None:
        """Weights, and with `clock` the optimizer too."""
        self.group.all("load", checkpoint, clock)

    def describe(self) -> str:
        return self.group.all("describe")[0]


def patch_weight(config: PPOConfig) -> float:
    """Of the actor's model."""
    model = config.actor_rollout_ref.model
    return ModelSizes.from_folder(check_model_folder(model.path), model.override_config).patch_weight


def flop_counter(config: PPOConfig) -> FlopCounter:
    """Of the actor's model as the config changes it, and what of it is trained."""
    workers = config.actor_rollout_ref
    folder = check_model_folder(workers.model.path)
    whole = not (workers.actor.freeze or workers.actor.freeze_vision_tower or uses_adapters(workers.model))
    trained = None if whole else TrainedParts.of(chosen_model(workers, folder))
    return FlopCounter(model_config(folder, workers.model.override_config), trained)


def wait_for_files(folder: Path, written: Sequence[Mapping[str, int]], patience: float = _SEEN_WITHIN) -> None:
    """Until this process sees all files (relative path -> bytes) that ranks on other nodes see in `folder`.

    Raises OSError naming some that do not come: a network file system may show them later, another disk never.
    """
    expected = {name: size for files in written for name, size in files.items()}

    def missing() -> list[str]:
        here = files_in(folder)
        return sorted(name for name, size in expected.items() if here.get(name) != size)

    if not wait_until(lambda: not missing(), patience):
        raise OSError(
            f"{folder}: after {patience:.0f} s this node does not see {missing()[:5]}, which other nodes wrote; "
            "trainer.default_local_dir must be on a file system that all nodes share"
        )


class Rollouts:
    """Engine replicas; each serves a share of the prompts. An engine of tensor-parallel size t is t ranks side by side:
    all get its share, the first returns the answers."""

    def __init__(self, group: WorkerGroup, ranks_per_engine: int) -> None:
        assert group.size % ranks_per_engine == 0, f"{group.size} ranks, engines of {ranks_per_engine}"
        self.group = group
        self.ranks_per_engine = ranks_per_engine
        self.engines = group.size // ranks_per_engine

    def build(self, config: PPOConfig, stores: Sequence[Path], *, waits_for_weights: bool) -> None:
        """`waits_for_weights`: an actor will send them before the first answer."""
        size = self.ranks_per_engine
        firsts = range(0, self.group.size, size)
        addresses = {first: self.group.rendezvous(first) if size > 1 else None for first in firsts}
        places = [
            Place(self.engines, rank % size, size, addresses[rank - rank % size]) for rank in range(self.group.size)
        ]
        self.group.build(RolloutWorker, [(config, stores, place, waits_for_weights) for place in places])

    def plain_log_probs(
        self, folder: Path, prompt: Prompt, answer: TokenIds, *, dtype: str, temperature: float
    ) -> tuple[LogProbs, str]:
        """Of `answer` by the plain model in `folder`, and the device it ran on; `dtype` is fp32 or bf16."""
        call = self.group.submit(0, "plain_log_probs", folder, prompt, answer, dtype, temperature)
        return self.group.gather([call])[0]

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int, sink: Sink | None = None
    ) -> list[list[Response]]:
        """`sampling.n` answers for each prompt, in the order of `prompts`; each goes to `sink` as soon as it ends."""
        shares = np.array_split(np.arange(len(prompts)), self.engines)
        firsts = np.cumsum([0, *map(len, shares)])[:-1]
        arguments = []
        for rank in range(self.group.size):
            engine, tp_rank = divmod(rank, self.ranks_per_engine)
            own = [prompts[i] for i in shares[engine]]
            arguments.append((own, sampling, step, sink if tp_rank == 0 else None, int(firsts[engine])))
        parts = self.group.each("generate", arguments)
        check_same_answers(parts, self.ranks_per_engine)
        return [answers for part in parts[:: self.ranks_per_engine] for answers in part]


def check_same_answers(parts: Sequence[Sequence[Sequence[Response]]], ranks_per_engine: int) -> None:
    """Raises AssertionError where two ranks of one engine wrote different tokens: their batches were not the same.

    `parts`: by rank, what `RolloutWorker.generate` returns.
    """
    for rank, part in enumerate(parts):
        first = rank - rank % ranks_per_engine
        for place, (mine, theirs) in enumerate(zip(part, parts[first], strict=True)):
            same = all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(mine, theirs, strict=True))
            assert same, f"rollout ranks {first} and {rank} are one engine and answered prompt {place} differently"


def packed_tokens(groups: Sequence[TrainGroup]) -> int:
    """Tokens of a packed forward: each group's prompt once, and its answers."""
    return sum(len(g.prompt.token_ids) for g in groups) + response_tokens(groups)


def peak_memory(groups: Sequence[WorkerGroup]) -> dict[str, float]:
    """Largest memory figures over all workers; what is resident on the host, of all together."""
    found: dict[str, list[float]] = {}
    for group in groups:
        for metrics in group.all("memory"):
            for name, value in metrics.items():
                found.setdefault(name, []).append(value)
    return {name: sum(values) if "resident" in name else max(values) for name, values in found.items()}
