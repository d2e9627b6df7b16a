"""`python3 -m verl.trainer.main_eval key=value ...`: scores a parquet file of answers, without a model.

Prints one line per metric under the names that validation uses, each data source by itself.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl.config import EvaluationConfig, load
from verl.config.cli import overrides_from
from verl.config.evaluation import EvaluationDataConfig
from verl.protocol import Prompt, Score
from verl.utils.files import write_text_atomic
from verl.utils.report.validation import SourceReport, ValidationRow, classification_report, validation_metrics
from verl.utils.reward_score import known_classes
from verl.utils.reward_score.custom import CustomFunction
from verl.workers.reward_manager import RewardFailureRateError, RewardItem, RewardManager


def evaluate(config: EvaluationConfig) -> dict[str, SourceReport]:
    """Score every answer of the file; one report per data source.

    Raises ValueError naming file, row and column, and RewardFailureRateError when too many answers cannot be scored.
    """
    custom = config.custom_reward_function
    manager = RewardManager(
        max_failure_rate=config.reward.max_failure_rate,
        custom=None if custom.path is None else CustomFunction(custom.path, custom.name, custom.reward_kwargs),
        answer_format=config.reward.format,
        timeout_s=config.reward.timeout,
    )
    items = read_answers(config.data)
    manager.check_prompts({item.prompt.uid: item.prompt for item in items}.values())
    return reports_of(items, manager.score(items))


def reports_of(items: list[RewardItem], scores: list[Score]) -> dict[str, SourceReport]:
    """Reports by data source, classes in the order of their task."""
    sources = dict.fromkeys(item.prompt.data_source for item in items)
    classes = {source: names for source in sources if (names := known_classes(source)) is not None}
    rows = [
        ValidationRow(item.prompt.uid, item.prompt.data_source, item.prompt.ground_truth, score)
        for item, score in zip(items, scores, strict=True)
    ]
    return classification_report(rows, classes)


def read_answers(data: EvaluationDataConfig) -> list[RewardItem]:
    """Every answer with what is needed to score it. Raises ValueError naming file, row and column."""
    path = Path(data.path).expanduser()
    if not path.is_file():
        raise ValueError(f"data.path={data.path}: no such file; main_generation writes one")
    keys = {
        "data.response_key": data.response_key,
        "data.data_source_key": data.data_source_key,
        "data.reward_model_key": data.reward_model_key,
    }
    try:
        present = pq.read_schema(path).names
        for key, name in keys.items():
            if name not in present:
                raise ValueError(f"{path}: no column {name!r} ({key}); it has {present}")
        optional = [name for name in (data.prompt_key, "extra_info") if name in present]
        records = pq.read_table(path, columns=[*dict.fromkeys([*keys.values(), *optional])]).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error
    if not records:
        raise ValueError(f"{path}: no rows")
    return [item for number, record in enumerate(records) for item in _items(record, data, path, number)]


def _items(record: Mapping[str, Any], data: EvaluationDataConfig, path: Path, number: int) -> Iterator[RewardItem]:
    where = f"{path} row {number}"
    answers = record[data.response_key]
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise ValueError(f"{where}: column {data.response_key!r} must hold one or more texts, got {answers!r:.200}")
    source, reward = record[data.data_source_key], record[data.reward_model_key]
    if not isinstance(source, str) or not source:
        raise ValueError(f"{where}: column {data.data_source_key!r} must name the data source, got {source!r}")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    if truth is None:
        raise ValueError(f"{where}: column {data.reward_model_key!r} must hold a ground_truth, got {reward!r:.200}")
    extra = dict(record.get("extra_info") or {})
    extra.setdefault("question", str(record.get(data.prompt_key, "")))
    text = truth if isinstance(truth, str) else json.dumps(truth)
    prompt = Prompt(f"{path.stem}-{number}", number, source, np.zeros(0, np.int32), (), (), text, extra)
    return (RewardItem(prompt, answer) for answer in answers)


def main(overrides: list[str] | None = None) -> int:
    """Exit code 0, 2 for a mistake in the config or data, 1 for anything else."""
    level = os.environ.get("VERL_PPO_LOGGING_LEVEL", "WARN")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        arguments = overrides_from("evaluation", sys.argv[1:] if overrides is None else overrides)
        if arguments is None:
            return 0
        config = load("evaluation", arguments)
        reports = evaluate(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RewardFailureRateError as error:  # the message says it all
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in validation_metrics(reports).items():
        print(f"{name.removeprefix('val/')}: {value:.4f}")
    if config.data.report_path is not None:
        content = {source: report.as_dict() for source, report in reports.items()}
        write_text_atomic(Path(config.data.report_path), json.dumps(content, indent=1, default=float) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
