"""`evaluation.yaml` as frozen dataclasses: scoring a parquet file of answers.

No field has a default: the yaml holds every value. The text under a field is its help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from verl.config.hdfs import no_input, no_output
from verl.config.nodes import CustomRewardConfig, ScoringConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationDataConfig:
    """The file and its columns."""

    path: str
    """A parquet file with a column of answers, as main_generation writes it."""
    prompt_key: str
    """Column with the prompt, shown in error messages and in the report."""
    response_key: str
    """Column with the answers: a list of texts a row, or one text."""
    data_source_key: str
    """Column that names the reward function."""
    reward_model_key: str
    """Column whose field ground_truth holds the label."""
    report_path: str | None
    """A json file for the whole report (recall per class, confusion matrix); null: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Root of evaluation.yaml."""

    data: EvaluationDataConfig
    custom_reward_function: CustomRewardConfig
    reward: ScoringConfig


def check_evaluation(config: EvaluationConfig) -> list[str]:
    """Every problem of the config, [] when it can run."""
    return list(_problems(config))


def _problems(config: EvaluationConfig) -> Iterator[str]:
    yield from no_input("data.path", config.data.path)
    yield from no_output("data.report_path", config.data.report_path)
    if config.reward.timeout <= 0:
        yield f"reward.timeout={config.reward.timeout} must be greater than 0"
    if not 0 <= config.reward.max_failure_rate <= 1:
        yield f"reward.max_failure_rate={config.reward.max_failure_rate} must be between 0 and 1"
