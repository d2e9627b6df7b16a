"""Training, validation and test rows of a run, read with one tokenizer and one image spec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl.config import PPOConfig
from verl.models.policy import check_model_folder, model_config, open_tokenizer
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.prompts import Truncation
from verl.utils.dataset.rl_dataset import DatasetOptions, RLDataset, load_rl_dataset
from verl.utils.dataset.rows import Columns
from verl.utils.dataset.sampler import epoch_order


@dataclass(frozen=True)
class RunData:
    """Everything read from disk before the workers start."""

    folder: Path
    """The model's."""
    tokenizer: Any
    train: RLDataset | None
    """None when the run only validates."""
    validation: RLDataset
    test: RLDataset | None

    @property
    def stores(self) -> tuple[Path, ...]:
        """Image stores that workers open."""
        sets = (self.train, self.validation, self.test)
        return tuple(dict.fromkeys(s.images.path for s in sets if s is not None and s.images is not None))

    def counted(self, config: PPOConfig) -> PPOConfig:
        """The config with `data.val_batch_size` as a number where anything is validated.

        Null is all rows: an engine prepares for as many answers at a time, and workers have no rows to count.
        """
        trainer = config.trainer
        validates = trainer.val_only or trainer.val_before_train or trainer.test_freq > 0
        rows = [len(self.validation)] if validates else []
        if self.test is not None and not trainer.val_only:
            rows.append(len(self.test))
        if config.data.val_batch_size is not None or not rows:
            return config
        return replace(config, data=replace(config.data, val_batch_size=max(rows)))


def load_run_data(config: PPOConfig) -> RunData:
    """Read all files. Raises ValueError naming file and row, or the key to change."""
    data, model = config.data, config.actor_rollout_ref.model
    folder = check_model_folder(model.path)
    model_config(folder, model.override_config)  # refused here rather than by every worker
    tokenizer = open_tokenizer(folder, trust_remote_code=model.trust_remote_code)
    spec = ImageSpec.from_pretrained(folder, min_pixels=data.min_pixels, max_pixels=data.max_pixels)
    options = dataset_options(config)

    def load(files: tuple[str, ...], limit: int = -1) -> RLDataset:
        return load_rl_dataset(files, tokenizer, spec, replace(options, max_samples=limit))

    validation = load(data.val_files, data.val_max_samples)
    if data.validation_shuffle:
        order = epoch_order(len(validation), seed=data.seed, epoch=0)
        validation = replace(validation, prompts=tuple(validation.prompts[i] for i in order))
    train = None if config.trainer.val_only else load(data.train_files, data.train_max_samples)
    test = None if data.test_files is None else load(data.test_files)
    return RunData(folder, tokenizer, train, validation, test)


def dataset_options(config: PPOConfig) -> DatasetOptions:
    """How rows become prompts, the same for all files."""
    data = config.data
    return DatasetOptions(
        max_prompt_length=data.max_prompt_length,
        truncation=Truncation(data.truncation),
        filter_overlong_prompts=data.filter_overlong_prompts,
        columns=Columns(prompt=data.prompt_key, images=data.image_key, data_source=data.reward_fn_key),
        template_kwargs=data.apply_chat_template_kwargs,
        cache_dir=None if data.image_cache_dir is None else Path(data.image_cache_dir),
        workers=None if data.dataloader_num_workers is None else max(1, data.dataloader_num_workers),
    )
