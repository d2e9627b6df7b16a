"""`python3 -m verl.trainer.sft_trainer key=value ...`, or the same under `torchrun` for several ranks.

Supervised fine-tuning on the data, packing and engine of RL: a row is a prompt with one answer. Every rank runs this
loop on the same plan, so ranks agree without being told.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from verl.algorithms.aggregation import token_weights
from verl.config import SFTConfig, load, to_dict, to_yaml
from verl.config.cli import overrides_from
from verl.config.derived import config_differences, sft_model, sft_optim, sft_resume_mode
from verl.models.freeze import parameter_table
from verl.models.policy import check_model_folder, load_policy, open_tokenizer, stop_ids
from verl.models.sizes import ModelSizes
from verl.packing.balance import plan_mini_batch
from verl.protocol import Group, Prompt, Response, TrainGroup, TrainSample
from verl.trainer.ppo.batch import response_tokens
from verl.trainer.ppo.scoring import Scorer, build_reward_manager, check_scorable
from verl.trainer.ppo.validation import ValidationResult, validate
from verl.utils.checkpoint.identity import Identity, check_same_run, run_identity
from verl.utils.checkpoint.manager import Checkpoint, CheckpointManager
from verl.utils.dataset.image_store import open_images
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import PatchSource, open_patches
from verl.utils.dataset.prompts import Truncation
from verl.utils.dataset.rl_dataset import (
    DatasetOptions,
    RLDataset,
    SFTDataset,
    SFTExample,
    load_rl_dataset,
    load_sft_dataset,
)
from verl.utils.dataset.rows import Columns
from verl.utils.dataset.sampler import Sampler
from verl.utils.timing import Phases
from verl.utils.tracking import Tracker
from verl.workers.actor.build import (
    build_policy,
    build_runner,
    build_train_engine,
    check_same_adapters,
    load_engine,
    save_engine,
)
from verl.workers.actor.engine import full_parameters
from verl.workers.actor.objective import SFTObjective, merge_metrics
from verl.workers.rollout.base import RolloutEngine, Sampling
from verl.workers.rollout.hf import HFEngine
from verl.workers.runtime import (
    all_gather_objects,
    compute_dtype,
    import_external,
    memory_metrics,
    node_leader_first,
    resolve_device,
    seed_draws,
    start_process_group_from_env,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SFTData:
    """Everything read from disk."""

    train: SFTDataset
    validation: SFTDataset
    test: RLDataset | None

    @property
    def stores(self) -> list[Path]:
        sets = (self.train, self.validation, self.test)
        return [s.images.path for s in sets if s is not None and s.images is not None]


def load_sft_data(config: SFTConfig, tokenizer: Any, folder: Path) -> SFTData:
    """Raises ValueError naming file and row, or the key to change."""
    data = config.data
    options = DatasetOptions(
        max_prompt_length=data.max_prompt_length,
        max_total_length=data.max_length,
        truncation=Truncation(data.truncation),
        filter_overlong_prompts=data.filter_overlong_prompts,
        columns=Columns(prompt=data.prompt_key, images=data.image_key, response=data.response_key),
        cache_dir=None if data.image_cache_dir is None else Path(data.image_cache_dir),
    )
    spec = ImageSpec.from_pretrained(folder, min_pixels=data.min_pixels, max_pixels=data.max_pixels)
    prompts_only = replace(options, columns=replace(options.columns, response=None))
    return SFTData(
        train=load_sft_dataset(data.train_files, tokenizer, spec, options),
        validation=load_sft_dataset(data.val_files, tokenizer, spec, options),
        test=None if data.test_files is None else load_rl_dataset(data.test_files, tokenizer, spec, prompts_only),
    )


def to_groups(examples: Sequence[SFTExample]) -> list[TrainGroup]:
    """Rows of one optimizer step; weights are those of a mean over all their answer tokens."""
    weights = token_weights([len(e.response_ids) for e in examples])
    return [
        TrainGroup(e.prompt, (TrainSample(index, e.response_ids, weight),))
        for index, (e, weight) in enumerate(zip(examples, weights, strict=True))
    ]


class SFTTrainer:
    """One rank of supervised fine-tuning."""

    def __init__(self, config: SFTConfig) -> None:
        self.config = config
        self.device = resolve_device(config.trainer.device)
        self.rank, self.world = start_process_group_from_env(self.device)
        seed_draws(config.trainer.seed, 0)
        import_external(config.model.external_lib)
        self.folder = check_model_folder(config.model.partial_pretrain, "model.partial_pretrain")
        self.tokenizer = open_tokenizer(self.folder, trust_remote_code=config.model.trust_remote_code)
        with node_leader_first():
            self.data = load_sft_data(config, self.tokenizer, self.folder)
        if self.rank == 0:
            self._say_cut_answers()
        data, trainer = config.data, config.trainer
        self.sampler = Sampler(len(self.data.train), seed=data.seed, shuffle=data.shuffle, drop_last=False)
        self.steps_per_epoch = self.sampler.batches_per_epoch(data.train_batch_size)
        self.total_steps = trainer.total_training_steps or trainer.total_epochs * self.steps_per_epoch
        self.patch_weight = ModelSizes.from_folder(self.folder, config.model.override_config).patch_weight
        self.budget = data.micro_batch_size_per_gpu * data.max_length
        self.scorer = Scorer(build_reward_manager(config), self.tokenizer, open_images(self.data.stores))
        check_scorable(self.scorer.manager, data.val_files, [e.prompt for e in self.data.validation])
        check_scorable(self.scorer.manager, data.test_files or (), self.data.test or ())
        self.run_dir = Path(trainer.default_local_dir)
        self.checkpoints = CheckpointManager(self.run_dir, keep=trainer.max_actor_ckpt_to_keep)
        if self.rank == 0:
            self.checkpoints.lock()
        self.checkpoint = self.checkpoints.find(sft_resume_mode(config), trainer.resume_path)
        self.identity = self._identity()
        if self.checkpoint is not None:
            check_same_run(self.checkpoint, self.identity)
            check_same_adapters(self.checkpoint, sft_model(config), self.folder, "model")
        self._build_engines()
        self.step = 0
        self.finished = False
        """The resumed run had come to its end, by steps, time or the stop rule."""

    def _build_engines(self) -> None:
        config = self.config
        patches = open_patches(self.data.stores, ImageSpec.from_pretrained(self.folder), self.device)
        policy = build_policy(
            self.folder,
            self.tokenizer,
            sft_model(config),
            config.model.fsdp_config,
            device=self.device,
            trained=True,
            freeze_vision=config.model.freeze_vision_tower,
            frozen=config.model.freeze,
            offload=config.model.fsdp_config.param_offload,
        )
        runner = build_runner(policy, patches, self.device, temperature=1.0)
        self.engine = build_train_engine(
            runner,
            sft_optim(config),
            config.model.fsdp_config,
            clip_grad=config.optim.clip_grad,
            optimizer_steps=self.total_steps,
        )
        self.generator = self._build_generator(patches)

    def _build_generator(self, patches: PatchSource) -> RolloutEngine:
        """The engine of `rollout.name`; it lives in this process, beside the weights it is given."""
        rollout = self.config.rollout
        if rollout.name != "hf":
            raise ValueError(f"rollout.name={rollout.name}: validation answers of SFT are written by hf; set hf")
        dtype = compute_dtype(rollout.dtype, self.device)
        copy = load_policy(self.folder, self.tokenizer, dtype=dtype, overrides=self.config.model.override_config)
        return HFEngine(
            copy.to(self.device),
            patches,
            stop_ids=stop_ids(self.folder, self.tokenizer),
            batch_size=rollout.hf_batch_size,
        )

    def fit(self) -> dict[str, float]:
        """Train until the steps, the time or the stop rule end it; returns the last validation's metrics."""
        self._open_run()
        begin, metrics = time.monotonic(), {}
        if self.config.trainer.val_before_train and self.step == 0:
            self._log(self._validate().metrics)
        while self.step < self.total_steps and not self.finished:
            self.step += 1
            metrics = self._step()
            late = self._out_of_time(begin)
            last = late or self.step == self.total_steps
            reached = False
            if last or self._due(self.config.trainer.test_freq):
                result = self._validate()
                metrics |= result.metrics | {"val/parse_failure": result.parse_failure, "val/accuracy": result.accuracy}
                reached = self._good_enough(result)
                if last and not reached:
                    self._say_unreached(result)
            # The row first: a run that resumes from the checkpoint goes on with the next step.
            self._log(metrics)
            if last or reached or self._due(self.config.trainer.save_freq):
                self._save(metrics, finished=last or reached)
            if late or reached:
                break
        return metrics | self._report_test()

    def _step(self) -> dict[str, float]:
        # By step, so that a resumed run draws what an uninterrupted one does.
        seed_draws(self.config.trainer.seed, self.step)
        phase = Phases()
        with phase("step"):
            rows = self.sampler.next_batch(self.config.data.train_batch_size)
            groups = to_groups([self.data.train[int(i)] for i in rows])
            plan = plan_mini_batch(
                groups, ranks=self.world, token_budget=self.budget, patch_weight=self.patch_weight, balanced=True
            )
            mine = self.engine.step(plan[self.rank], SFTObjective(), response_tokens(groups))
        merged = merge_metrics(all_gather_objects(mine)) | {k: mine[k] for k in ("grad_norm", "lr", "skipped")}
        metrics = {f"train/{name}": value for name, value in merged.items()}
        metrics |= {"training/global_step": float(self.step), "training/epoch": float(self.sampler.epoch)}
        return metrics | phase.metrics() | memory_metrics(self.device)

    def _due(self, frequency: int | str) -> bool:
        if frequency == "after_each_epoch":
            return self.step % self.steps_per_epoch == 0
        return int(frequency) > 0 and self.step % int(frequency) == 0

    def _out_of_time(self, begin: float) -> bool:
        """Rank 0's clock decides for all."""
        limit = self.config.trainer.max_seconds
        return limit is not None and all_gather_objects(time.monotonic() - begin)[0] > limit

    def _good_enough(self, result: ValidationResult) -> bool:
        limit = self.config.trainer.stop_parse_failure
        return limit is not None and result.parse_failure < limit

    def _say_cut_answers(self) -> None:
        """Validation draws answers: what is taught must fit into them."""
        limit = self.config.data.max_response_length
        lengths = [len(example.response_ids) for example in self.data.train]
        if longer := sum(length > limit for length in lengths):
            log.warning(
                "data.max_response_length=%d cuts validation answers, but %d of %d supervised answers are longer, up "
                "to %d tokens: what the model is taught to write will count as malformed",
                *(limit, longer, len(lengths), max(lengths)),
            )

    def _say_unreached(self, result: ValidationResult) -> None:
        limit = self.config.trainer.stop_parse_failure
        if limit is not None and self.rank == 0:
            log.warning(
                "training ends after step %d without reaching trainer.stop_parse_failure=%g: %.1f %% of the validation "
                "answers are malformed; give it more epochs, steps or seconds",
                *(self.step, limit, 100 * result.parse_failure),
            )

    def _validate(self) -> ValidationResult:
        return self._score([e.prompt for e in self.data.validation], f"val_step_{self.step}")

    def _report_test(self) -> dict[str, float]:
        """Score the test rows once, with the final weights."""
        if self.data.test is None:
            return {}
        result = self._score(self.data.test.prompts, "test")
        metrics = {name.replace("val", "test", 1): value for name, value in result.metrics.items()}
        self._log(metrics | {"test/accuracy": result.accuracy})
        return metrics

    def _sampling(self) -> Sampling:
        rollout, data = self.config.rollout, self.config.data
        return Sampling(
            n=rollout.n,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            do_sample=rollout.do_sample,
            max_tokens=data.max_response_length,
            max_context=data.max_prompt_length + data.max_response_length,
            ignore_eos=False,
            seed=rollout.seed,
        )

    def _score(self, prompts: Sequence[Prompt], name: str) -> ValidationResult:
        """Answers are drawn on all ranks; rank 0 scores them and tells the others, so that all decide alike.

        The groups themselves stay on rank 0.
        """
        self.generator.load_weights(full_parameters(self.engine.policy))

        def generate(prompts: Sequence[Prompt]) -> list[list[Response]]:
            shares = np.array_split(np.arange(len(prompts)), self.world)
            mine = self.generator.generate([prompts[i] for i in shares[self.rank]], self._sampling(), step=0)
            return [answers for part in all_gather_objects(mine) for answers in part]

        def answer(part: Sequence[Prompt]) -> list[Group]:
            responses = generate(part)
            return self.scorer.score(part, responses) if self.rank == 0 else []

        result = validate(prompts, answer, self.config.data.val_batch_size)
        if self.rank == 0:
            result.write(self.run_dir / "reports" / f"{name}.json", step=self.step)
            self.scorer.write_samples(self.run_dir / "samples" / f"{name}.jsonl", result.groups)
            folder = self.config.trainer.validation_data_dir
            if folder is not None:
                self.scorer.write_samples(Path(folder) / f"{name}.jsonl", result.groups)
            shown = result.groups[: self.config.trainer.log_val_generations]
            self.tracker.log_samples(self.step, self.scorer.tracker_samples(shown))
        return ValidationResult(all_gather_objects(result.reports)[0], result.groups)

    # --- run folder and checkpoints ------------------------------------------------------------------------------

    def _open_run(self) -> None:
        trainer, checkpoint = self.config.trainer, self.checkpoint
        if checkpoint is not None:
            self._resume(checkpoint)
        if self.rank == 0:
            self.checkpoints.begin(checkpoint)
            (self.run_dir / "config.yaml").write_text(to_yaml(self.config))
            self.tracker = Tracker(
                trainer.logger,
                self.run_dir,
                project=trainer.project_name,
                experiment=trainer.experiment_name,
                config=to_dict(self.config),
                total_steps=self.total_steps,
                resume_step=self.step,
            )
            length = f"{self.steps_per_epoch} steps an epoch, at most {self.total_steps} steps"
            print(f"sft: {len(self.data.train)} rows, {length}, {self.world} rank(s) on {self.device}", flush=True)
            print(f"sft: {parameter_table(self.engine.policy.hf)}", flush=True)

    def _identity(self) -> Identity:
        return run_identity(
            model_key="model.partial_pretrain",
            model=self.config.model.partial_pretrain,
            folder=self.folder,
            train_files=self.config.data.train_files,
            rows_digest=self.data.train.digest,
        )

    def _save(self, metrics: dict[str, float], *, finished: bool) -> None:
        dtype = compute_dtype(self.config.rollout.dtype, self.device)
        state: dict[str, Any] = {"identity": self.identity, "sampler": self.sampler.state(), "finished": finished}
        state["config"] = to_dict(self.config)
        with self._saving(state, metrics) as checkpoint:
            state["engine"] = save_engine(self.engine, checkpoint, source=self.folder, dtype=dtype)

    @contextmanager
    def _saving(self, state: dict[str, Any], metrics: dict[str, float]) -> Iterator[Checkpoint]:
        """Rank 0 owns the folder; the others write into the one it names, and leave once all have."""
        if self.rank == 0:
            with self.checkpoints.saving(self.step, state, metrics) as checkpoint:
                all_gather_objects(checkpoint)
                yield checkpoint
                dist.barrier()
        else:
            yield all_gather_objects(None)[0]
            dist.barrier()

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.read_data()
        load_engine(self.engine, checkpoint, state["engine"])
        self.sampler.load_state(state["sampler"])
        self.step = checkpoint.step
        self.finished = state["finished"] and self.config.trainer.stop_parse_failure is not None
        if self.rank == 0:
            now = to_dict(self.config)
            for line in config_differences(state.get("config", now), now):  # an older version stored none
                log.warning("resumed with another setting than the checkpoint's: %s", line)
            print(f"resumed {checkpoint.path}", flush=True)

    def _log(self, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            self.tracker.log(self.step, metrics)

    def close(self) -> None:
        if self.rank == 0 and hasattr(self, "tracker"):
            self.tracker.close()
        self.checkpoints.close()
        dist.destroy_process_group()


def ranks_of_torchrun() -> list[str]:
    """Overrides that say how many ranks there are: under torchrun its environment, else one."""
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("WORLD_SIZE", "1"))
    return [f"trainer.n_gpus_per_node={local}", f"trainer.nnodes={world // local}"]


def main(overrides: list[str] | None = None) -> int:
    """Exit code 0, 2 for a mistake in the config or data, 1 for anything else."""
    level = os.environ.get("VERL_SFT_LOGGING_LEVEL", "WARN")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    disable_progress_bar()  # of the library's loading and saving, between the lines of the steps
    try:
        arguments = overrides_from("sft_trainer", sys.argv[1:] if overrides is None else overrides)
        if arguments is None:
            return 0
        config = load("sft_trainer", arguments + ranks_of_torchrun())
        trainer = SFTTrainer(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        trainer.fit()
    except ValueError as error:
        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
