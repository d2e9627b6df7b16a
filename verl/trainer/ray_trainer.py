"""The RL loop. One driver; every heavy thing happens in workers.

Reading order: `fit`, `_step`, then the callees in `verl/trainer/ppo/`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl.algorithms import rollout_correction
from verl.algorithms.advantage import Advantages, advantage_metrics, estimate_groups
from verl.algorithms.kl import AdaptiveKL, kl_sums
from verl.config import PPOConfig, batch_plan, render_table, resolved_table, to_dict, to_yaml, uses_reference
from verl.config.derived import config_differences, max_context
from verl.config.plan import is_due
from verl.models.policy import check_model_folder
from verl.protocol import Group, Prompt, Response, TrainGroup
from verl.trainer.ppo import batch as step_batch
from verl.trainer.ppo.canary import Canary
from verl.trainer.ppo.cluster import Workers, start_workers
from verl.trainer.ppo.data import RunData, load_run_data
from verl.trainer.ppo.metrics import (
    actor_metrics,
    balance_metrics,
    length_metrics,
    score_metrics,
    throughput_metrics,
)
from verl.trainer.ppo.scoring import Scorer, Scoring, build_reward_manager, check_scorable
from verl.trainer.ppo.validation import ValidationResult, validate
from verl.utils.checkpoint.identity import Identity, check_same_run, run_identity
from verl.utils.checkpoint.manager import Checkpoint, CheckpointManager
from verl.utils.dataset.image_store import open_images
from verl.utils.dataset.sampler import Sampler
from verl.utils.report.validation import check_metric_name
from verl.utils.reward_score import known_classes
from verl.utils.timing import Phases
from verl.utils.tracking import Tracker
from verl.workers.actor.build import check_same_adapters
from verl.workers.reward_manager import reward_metrics
from verl.workers.rollout.base import Sampling

log = logging.getLogger(__name__)

ACCURACY = "val/accuracy"
"""Mean accuracy over data sources: what `keep_best` looks at by default."""
_SAMPLED_GROUPS = 4  # groups written to the run folder each step
_UNTAUGHT = 3  # steps in a row without a difference within any group, after which the run says so


class Trainer:
    """GRPO from a config. `fit` trains (or only validates, with `trainer.val_only`).

    Making one reads the data and checks what a run can be refused for, before anything is started or written.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        root = Path(config.trainer.default_local_dir)
        self.run_dir = root / "eval" if config.trainer.val_only else root
        self.data: RunData = load_run_data(config)
        self.scorer = Scorer(build_reward_manager(config), self.data.tokenizer, open_images(self.data.stores))
        check_scorable(self.scorer.manager, config.data.train_files, self.data.train or ())
        check_scorable(self.scorer.manager, config.data.val_files, self.data.validation)
        check_scorable(self.scorer.manager, config.data.test_files or (), self.data.test or ())
        self._check_best_metric()
        self.checkpoints = CheckpointManager(
            root,
            keep=config.trainer.max_actor_ckpt_to_keep,
            keep_best=(config.trainer.best_metric or ACCURACY) if config.trainer.keep_best else None,
        )
        self.correction_metrics: dict[str, float] = {}
        self.kl_control = AdaptiveKL.of(config.algorithm.kl_ctrl)
        self.weights_from = config.actor_rollout_ref.model.path
        self.canary: Canary | None = None
        self.step = 0
        self.untaught = 0
        self.checkpoint = self._find_checkpoint()
        if self.data.train is not None:
            self.plan = batch_plan(config, len(self.data.train))
            self.sampler = Sampler(len(self.data.train), seed=config.data.seed, shuffle=config.data.shuffle)
            self.identity = self._identity()
            if self.checkpoint is not None:
                check_same_run(self.checkpoint, self.identity)
        if self.checkpoint is not None:
            model = config.actor_rollout_ref.model
            check_same_adapters(self.checkpoint, model, self.data.folder, "actor_rollout_ref.model")
        if self.data.train is not None:
            self.checkpoints.lock()
        self.workers: Workers
        self.tracker: Tracker

    def fit(self) -> dict[str, float]:
        """Run to the end; returns the last metrics (validation or test)."""
        if self.config.trainer.val_only:
            return self._evaluate_only()
        self._start()
        if self.config.trainer.val_before_train and self.step == 0:
            self._validate()
        while self.step < self.plan.total_steps:
            self.step += 1
            metrics = self._step()
            self._watch_groups(metrics)
            if is_due(self.config.trainer.test_freq, self.step, self.plan.total_steps):
                metrics |= self._validate()
            self._log_and_save(metrics)
        return self._report_test()

    def _step(self) -> dict[str, float]:
        phase = Phases()
        with phase("step"):
            prompts = self._next_prompts()
            with phase("gen"):
                scoring, responses = self._generate(prompts, self.sampling, self.step)
                self.workers.rest()
            with phase("reward"):
                groups = self._score(scoring, responses)
            minis = self._cut(len(groups))
            with phase("old_log_prob"):
                old = self._old_log_probs(groups, minis)
            ref: step_batch.LogProbTable = {}
            if uses_reference(self.config) and self._updates_now():
                with phase("ref"):
                    ref = self.workers.actors.log_probs(self._scored(groups, range(len(groups))), reference=True)
            with phase("adv"):
                rewarded = self._penalise(groups, old, ref)
                advantages = self._estimate(rewarded)
                batches = self._train_batches(rewarded, advantages, minis, old, ref)
            with phase("update_actor"):
                updates = self.workers.actors.update(batches) if self._updates_now() else []
            with phase("update_weights"):
                synced = self._sync()
        self._write_samples(groups)
        return self._metrics(phase, groups, rewarded, advantages, updates) | synced

    # --- start and end -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        config, checkpoint = self.config, self.checkpoint
        assert self.data.train is not None
        print(render_table(resolved_table(config, len(self.data.train), len(self.data.validation))), flush=True)
        self.sampling = self._sampling(validation=False)
        self._open_run(checkpoint.step if checkpoint else 0)
        self.checkpoints.begin(checkpoint)
        self.workers = start_workers(
            self.data.counted(config),
            self.data.stores,
            self.plan.optimizer_steps,
            self.scorer.manager,
            prompts=self._train_prompts(),
        )
        self.scorer.pool = self.workers.rewards
        print(f"rollout: {config.actor_rollout_ref.rollout.name} on {self.workers.device}; weights from "
              f"{self.weights_from}; {self.workers.actors.describe()}", flush=True)  # fmt: skip
        if checkpoint is not None:
            self._resume(checkpoint)
        self._sync()
        self._start_canary(self.data.train.prompts)

    def _start_canary(self, prompts: Sequence[Prompt]) -> None:
        """After the first transfer. An engine that runs the actor's own code (hf) needs none."""
        workers, node, checkpoint = self.workers, self.config.actor_rollout_ref, self.checkpoint
        if node.rollout.name == "hf":
            return
        # Not the sampling of validation: the actor's log-probs are at the temperature of training.
        sampling = self._sampling(validation=False)
        if sampling.greedy:
            log.warning("no canary: actor_rollout_ref.rollout has temperature=0 or do_sample=False, and greedy answers "
                        "have no distribution of the actor to be compared with")  # fmt: skip
            return
        self.canary = Canary(workers.actors, workers.rollouts, prompts, sampling, device=workers.device)
        adapted = checkpoint is None and node.model.lora_adapter_path is not None
        folder = checkpoint.huggingface if checkpoint else check_model_folder(node.model.path)
        print(self.canary.start(folder, adapted=adapted), flush=True)

    def _train_prompts(self) -> list[Prompt]:
        assert self.data.train is not None
        return [self.data.train[i] for i in range(len(self.data.train))]

    def _check_best_metric(self) -> None:
        """A mistyped `trainer.best_metric` would otherwise be noticed at the first validation."""
        trainer = self.config.trainer
        if trainer.best_metric is None or not trainer.keep_best or trainer.val_only:
            return
        sources = {p.data_source: known_classes(p.data_source) for p in self.data.validation}
        try:
            answers = self.config.actor_rollout_ref.rollout.val_kwargs.n
            check_metric_name(trainer.best_metric, sources, answers, also=(ACCURACY,))
        except ValueError as error:
            raise ValueError(f"trainer.best_metric={trainer.best_metric}: {error}") from None

    def _find_checkpoint(self) -> Checkpoint | None:
        """What the run starts from. An evaluation takes only a checkpoint that was named."""
        trainer = self.config.trainer
        if trainer.val_only and trainer.resume_mode == "auto":
            return None
        return self.checkpoints.find(trainer.resume_mode, trainer.resume_from_path)

    def _open_run(self, resume_step: int) -> None:
        config = self.config.trainer
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "config.yaml").write_text(to_yaml(self.config))
        self.tracker = Tracker(
            config.logger,
            self.run_dir,
            project=config.project_name,
            experiment=config.experiment_name,
            config=to_dict(self.config),
            total_steps=None if config.val_only else self.plan.total_steps,
            resume_step=resume_step,
        )

    def _evaluate_only(self) -> dict[str, float]:
        """Score the validation files: the weights of MODEL_PATH, of a named checkpoint, or with a named adapter."""
        checkpoint, adapter = self.checkpoint, self.config.actor_rollout_ref.model.lora_adapter_path
        self._open_run(0)
        merges = checkpoint is not None or adapter is not None  # an actor holds what the engine is sent
        config = self.data.counted(self.config)
        self.workers = start_workers(config, self.data.stores, 1, self.scorer.manager, actors=merges)
        self.scorer.pool = self.workers.rewards
        if checkpoint is not None:
            self.workers.actors.load(checkpoint)
            self.weights_from = str(checkpoint.path)
        elif adapter is not None:
            self.weights_from += f" and the adapter {adapter}"
        if merges:
            self._sync()
            self._start_canary(self.data.validation.prompts)
        metrics = self._validate()
        self.tracker.log(self.step, metrics)
        accuracy = metrics.get(ACCURACY, float("nan"))
        print(f"validation: accuracy {accuracy:.4f} with the weights of {self.weights_from}; "
              f"reports in {self.run_dir / 'reports'}", flush=True)  # fmt: skip
        return metrics

    def _report_test(self) -> dict[str, float]:
        """Score the test rows once, with the best checkpoint where one is kept; else the last validation counts."""
        if self.data.test is None:
            return {}
        best = self.checkpoints.best() if self.config.trainer.keep_best else None
        if best is not None and best.step != self.step:
            self.workers.actors.load(best)
            self._sync()
        source = f"global_step_{self.step if best is None else best.step}"
        result = self._run_validation(self.data.test.prompts, "test", source)
        metrics = {name.replace("val", "test", 1): value for name, value in result.metrics.items()}
        metrics["test/accuracy"] = result.accuracy
        self.tracker.log(self.step, metrics)
        return metrics

    def close(self) -> None:
        """End trackers and workers, and give the run folder free."""
        for part in ("tracker", "workers", "checkpoints"):
            if hasattr(self, part):
                getattr(self, part).close()

    # --- the verbs of a step -------------------------------------------------------------------------------------

    def _sampling(self, *, validation: bool) -> Sampling:
        rollout, data = self.config.actor_rollout_ref.rollout, self.config.data
        how = rollout.val_kwargs if validation else rollout
        return Sampling(
            n=how.n,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            do_sample=how.do_sample,
            max_tokens=data.max_response_length,
            max_context=max_context(self.config),
            ignore_eos=rollout.ignore_eos,
            seed=rollout.seed,
        )

    def _next_prompts(self) -> list[Prompt]:
        assert self.data.train is not None
        return [self.data.train[int(i)] for i in self.sampler.next_batch(self.config.data.train_batch_size)]

    def _rng(self, purpose: int, seed: int | None = None) -> np.random.Generator:
        """Noise of the driver: a function of (seed, step, purpose), so a resumed run draws the same."""
        return np.random.default_rng([self.config.trainer.seed if seed is None else seed, self.step, purpose])

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int
    ) -> tuple[Scoring, list[list[Response]]]:
        """Answers; each is scored while others are still written."""
        scoring = self.scorer.begin(prompts)
        return scoring, self.workers.rollouts.generate(prompts, sampling, step=step, sink=scoring.sink)

    def _score(self, scoring: Scoring, responses: Sequence[Sequence[Response]]) -> list[Group]:
        groups = scoring.finish(responses)
        return step_batch.permute_scores(groups, self._rng(0)) if self.config.reward.shuffle else groups

    def _cut(self, count: int) -> list[step_batch.MiniBatchPlan]:
        actor = self.config.actor_rollout_ref.actor
        rng = self._rng(1, actor.data_loader_seed)
        return step_batch.cut_mini_batches(
            count, size=actor.ppo_mini_batch_size, epochs=actor.ppo_epochs, shuffle=actor.shuffle, rng=rng
        )

    def _estimate(self, groups: Sequence[Group]) -> list[Advantages]:
        algorithm = self.config.algorithm
        return estimate_groups(
            algorithm.adv_estimator,
            [g.scores for g in groups],
            [[len(r.token_ids) for r in g.responses] for g in groups],
            norm_by_std=algorithm.norm_adv_by_std_in_grpo,
        )

    def _scored(self, groups: Sequence[Group], members: Sequence[int]) -> list[TrainGroup]:
        """Answers that will be trained on, without advantages yet: which are kept depends only on which are ok."""
        kept = self._estimate(groups)
        return step_batch.train_groups(
            groups, kept, members, old={}, ref={}, loss_agg_mode="token-sum", loss_scale_factor=None
        )

    def _old_log_probs(
        self, groups: Sequence[Group], minis: Sequence[step_batch.MiniBatchPlan]
    ) -> step_batch.LogProbTable:
        """Log-probs before this step's updates, of the answers whose update is not the first one."""
        if not self._updates_now():
            return {}
        correction = self.config.algorithm.rollout_correction
        if correction.bypass_mode:
            return step_batch.sampler_log_probs(groups)
        needed = {g for mini in minis if not mini.first for g in mini.members}
        if self.config.algorithm.use_kl_in_reward or rollout_correction.is_on(correction):
            needed = set(range(len(groups)))
        return self.workers.actors.log_probs(self._scored(groups, sorted(needed)), reference=False)

    def _penalise(self, groups: list[Group], old: step_batch.LogProbTable, ref: step_batch.LogProbTable) -> list[Group]:
        if not self.config.algorithm.use_kl_in_reward or not self._updates_now():
            return groups
        sums = kl_sums(old, ref, self.config.algorithm.kl_penalty)
        coefficient = self.kl_control.observe(sums, old)
        return step_batch.penalise(groups, sums, coefficient)

    def _train_batches(
        self,
        groups: Sequence[Group],
        advantages: Sequence[Any],
        minis: Sequence[step_batch.MiniBatchPlan],
        old: step_batch.LogProbTable,
        ref: step_batch.LogProbTable,
    ) -> list[list[TrainGroup]]:
        actor, correction = self.config.actor_rollout_ref.actor, self.config.algorithm.rollout_correction

        def batches(weights: step_batch.LogProbTable) -> list[list[TrainGroup]]:
            return [
                step_batch.train_groups(
                    groups,
                    advantages,
                    mini.members,
                    old={} if mini.first and not correction.bypass_mode else old,
                    ref=ref if actor.use_kl_loss else {},
                    loss_agg_mode=actor.loss_agg_mode,
                    loss_scale_factor=actor.loss_scale_factor or float(self.config.data.max_response_length),
                    is_weights=weights,
                    with_sampler=mini.first,
                )
                for mini in minis
            ]

        self.correction_metrics = {}
        if not rollout_correction.is_on(correction) or not self._updates_now():
            return batches({})
        members = [step_batch.members_of(batch) for batch in batches({})]
        made = rollout_correction.correct(members, old, step_batch.sampler_log_probs(groups), correction)
        self.correction_metrics = made.metrics
        return batches(made.weights)

    def _updates_now(self) -> bool:
        return self.step >= self.config.trainer.critic_warmup

    def _sync(self) -> dict[str, float]:
        """The actor's weights into every engine; metrics."""
        when = self.config.actor_rollout_ref.rollout.checkpoint_engine.checksum
        in_training = self.step > 0 and not self.config.trainer.val_only
        validates = not in_training or is_due(self.config.trainer.test_freq, self.step, self.plan.total_steps)
        return self.workers.sync(with_checksum=when == "always" or (when == "validation" and validates))

    # --- validation, checkpoints, records ------------------------------------------------------------------------

    def _run_validation(self, prompts: Sequence[Prompt], name: str, source: str) -> ValidationResult:
        sampling = self._sampling(validation=True)

        def answer(part: Sequence[Prompt]) -> list[Group]:
            scoring, responses = self._generate(part, sampling, 0)
            return scoring.finish(responses)

        result = validate(prompts, answer, self.config.data.val_batch_size)
        result.write(self.run_dir / "reports" / f"{name}.json", step=self.step, weights=source)
        self._dump(self.config.trainer.validation_data_dir, f"{name}.jsonl", result.groups)
        shown = result.groups[: self.config.trainer.log_val_generations]
        self.tracker.log_samples(self.step, self.scorer.tracker_samples(shown))
        return result

    def _validate(self) -> dict[str, float]:
        phase = Phases()
        with phase("testing"):
            source = self.weights_from if self.step == 0 else f"global_step_{self.step}"
            result = self._run_validation(self.data.validation.prompts, f"val_step_{self.step}", source)
        metrics = result.metrics | phase.metrics()
        if np.isfinite(result.accuracy):
            metrics[ACCURACY] = result.accuracy
        if self.canary is not None and self.step > 0:
            metrics |= self.canary.check(self.step)
        asked = self.config.trainer.best_metric
        if asked is not None and asked not in metrics and self.config.trainer.keep_best:
            raise ValueError(f"trainer.best_metric={asked}: validation gives no such metric, only {sorted(metrics)}")
        if self.step == 0 and not self.config.trainer.val_only:
            self.tracker.log(0, metrics)
        return metrics

    def _watch_groups(self, metrics: dict[str, float]) -> None:
        """Say so when the reward has taught nothing for some steps: it tells no answer from its neighbours."""
        self.untaught = 0 if metrics.get("training/groups/mixed_share", 0.0) > 0 else self.untaught + 1
        if self.untaught == _UNTAUGHT:
            log.warning(
                "%d steps in which all answers of every group scored alike (mean %.3f): nothing is learned. "
                "Look at %s; malformed answers want a supervised start or a larger data.max_response_length, "
                "equal ones a higher temperature or more answers a prompt",
                *(_UNTAUGHT, metrics.get("critic/score/mean", float("nan")), self.run_dir / "samples"),
            )

    def _log_and_save(self, metrics: dict[str, float]) -> None:
        """Save by `save_freq`, and whenever validation finds a new best.

        The row is logged before the checkpoint counts: a run that resumes from it goes on with the next step.
        """
        name = self.checkpoints.keep_best
        better = name in metrics and self.checkpoints.would_be_best(metrics[name])
        due = is_due(self.config.trainer.save_freq, self.step, self.plan.total_steps)
        if not better and not due:
            self.tracker.log(self.step, metrics)
            return
        state: dict[str, Any] = {"identity": self.identity, "sampler": self.sampler.state()}
        state["kl_coef"] = self.kl_control.value
        state["config"] = to_dict(self.config)
        begin = time.perf_counter()

        def log_row() -> None:
            metrics["timing_s/save_checkpoint"] = time.perf_counter() - begin
            self.tracker.log(self.step, metrics)

        with self.checkpoints.saving(self.step, state, metrics, only_best=not due, before_commit=log_row) as checkpoint:
            state["engine"] = self.workers.actors.save(checkpoint)

    def _identity(self) -> Identity:
        assert self.data.train is not None
        return run_identity(
            model_key="actor_rollout_ref.model.path",
            model=self.config.actor_rollout_ref.model.path,
            folder=self.data.folder,
            train_files=self.config.data.train_files,
            rows_digest=self.data.train.digest,
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.read_data()
        for line in config_differences(state["config"], to_dict(self.config)):
            log.warning("resumed with another setting than the checkpoint's: %s", line)
        self.workers.actors.load(checkpoint, state["engine"])
        self.sampler.load_state(state["sampler"])
        self.kl_control.value = state["kl_coef"]
        self.step = checkpoint.step
        self.weights_from = str(checkpoint.path)
        print(f"resumed {checkpoint.path}", flush=True)

    def _write_samples(self, groups: Sequence[Group]) -> None:
        self.scorer.write_samples(self.run_dir / "samples" / f"step_{self.step:06d}.jsonl", groups[:_SAMPLED_GROUPS])
        self._dump(self.config.trainer.rollout_data_dir, f"step_{self.step:06d}.jsonl", groups)

    def _dump(self, folder: str | None, name: str, groups: Sequence[Group]) -> None:
        if folder is not None:
            self.scorer.write_samples(Path(folder) / name, groups)

    def _metrics(
        self,
        phase: Phases,
        groups: Sequence[Group],
        rewarded: Sequence[Group],
        advantages: Sequence[Any],
        updates: Sequence[dict[str, float]],
    ) -> dict[str, float]:
        data, actor = self.config.data, self.config.actor_rollout_ref.actor
        scores = [g.scores for g in groups]
        sources = [g.prompt.data_source for g in groups for _ in g.scores]
        metrics = {"training/global_step": float(self.step), "training/epoch": float(self.sampler.epoch)}
        metrics |= score_metrics(groups, rewarded, advantages)
        metrics |= advantage_metrics(scores, advantages)
        metrics |= reward_metrics(sources, [s for group in scores for s in group])
        metrics |= self.scorer.pool_metrics
        metrics |= length_metrics(groups, max_prompt=data.max_prompt_length, max_response=data.max_response_length)
        metrics |= balance_metrics(groups, self.workers.actors.loads)
        metrics |= actor_metrics(updates, actor.kl_loss_coef) | self.correction_metrics
        metrics |= self.kl_control.metrics() if self.config.algorithm.use_kl_in_reward else {}
        metrics |= throughput_metrics(groups, phase.seconds, self.workers.ranks)
        if self.workers.actors.meter is not None:
            metrics |= self.workers.actors.meter.metrics(phase.seconds)
        return metrics | self.workers.memory() | phase.metrics()
