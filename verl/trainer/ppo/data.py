"""Training, validation and test rows of a run, read with one tokenizer and one image spec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.config import PPOConfig
from verl.models.policy import check_model_folder, model_config, open_tokenizer
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.prompts import Truncation
from verl.utils.dataset.rl_dataset import DatasetOptions, RLDataset, load_rl_dataset
from verl.utils.dataset.rows import Columns


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


def load_run_data(config: PPOConfig) -> RunData:
    """Read all files. Raises ValueError naming file and row, or the key to change."""
    data, model = config.data, config.actor_rollout_ref.model
    folder = check_model_folder(model.path)
    model_config(folder, model.override_config)  # refused here rather than by every worker
    tokenizer = open_tokenizer(folder, trust_remote_code=model.trust_remote_code)
    spec = ImageSpec.from_pretrained(folder, min_pixels=data.min_pixels, max_pixels=data.max_pixels)
    options = DatasetOptions(
        max_prompt_length=data.max_prompt_length,
        truncation=Truncation(data.truncation),
        filter_overlong_prompts=data.filter_overlong_prompts,
        columns=Columns(prompt=data.prompt_key, images=data.image_key),
        cache_dir=None if data.image_cache_dir is None else Path(data.image_cache_dir),
    )

    def load(files: tuple[str, ...] | None) -> RLDataset | None:
        return None if files is None else load_rl_dataset(files, tokenizer, spec, options)

    validation = load(data.val_files)
    assert validation is not None
    train = None if config.trainer.val_only else load(data.train_files)
    return RunData(folder, tokenizer, train, validation, load(data.test_files))
