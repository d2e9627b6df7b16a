"""Shows how answers are scored, part by part, and why.

    python3 -m verl.utils.reward_score --task emg --file answers.jsonl --no-judge
    python3 -m verl.utils.reward_score --task emg --file answers.jsonl --judge.base_url=http://127.0.0.1:8000/v1 \
        --judge.model=my-model --judge.api_key_env=null

A line of the file is `{"answer": "...", "ground_truth": "..."}` (also `response`, `text`, `solution_str` or
`predict_str`; `tokens`, the length, is needed for length parts), or a line of a run's `samples/step_*.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verl.protocol import Prompt, Score
from verl.timeseries.tasks import get_task
from verl.utils.reward_score.composite import CAPPED, Composite
from verl.utils.reward_score.parts import PartKind
from verl.workers.reward_manager.manager import RewardItem, RewardManager

_TEXT_KEYS = ("answer", "response", "text", "solution_str", "predict_str")


def read_items(path: Path, data_source: str) -> list[RewardItem]:
    """Answers of a json-lines file. Raises ValueError naming file and line."""
    items: list[RewardItem] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {path}: not utf-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items += _items_of(line, f"{path}, line {number}", data_source, len(items))
    if not items:
        raise ValueError(f"--file {path}: holds no answer")
    return items


def _items_of(line: str, where: str, data_source: str, row: int) -> Iterator[RewardItem]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not json ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("ground_truth"), str):
        raise ValueError(f"{where}: expected an object with a text ground_truth")
    extra = {} if not isinstance(record.get("extra_info"), dict) else record["extra_info"]
    prompt = Prompt(
        str(record.get("uid", row)), row, data_source, np.zeros(0, np.int32), (), (), record["ground_truth"], extra
    )
    for answer in record.get("answers", [record]):
        text = next((answer[key] for key in _TEXT_KEYS if isinstance(answer.get(key), str)), None)
        if text is None:
            raise ValueError(f"{where}: no answer; give one of {', '.join(_TEXT_KEYS)}")
        yield RewardItem(prompt, text, answer.get("tokens"))


def reasons(composite: Composite, item: RewardItem, score: Score) -> str:
    """Why each part is what it is, in words."""
    if score.reason is not None:
        return f"failed: {score.reason}"
    formed, answer = composite.read(item.text)
    found = []
    for part in composite.parts:
        if part.name not in score.parts:
            unmet = [name for name in part.when if score.parts.get(name) != 1.0]
            found.append(f"{part.name}: left out, {' and '.join(unmet)} not 1")
        elif part.kind is PartKind.FORMAT and formed.fault is not None:
            found.append(f"{part.name}: {formed.fault}")
        elif part.kind is PartKind.LABEL and score.parts[part.name] != 1.0:
            found.append(f"{part.name}: {answer.label or 'nothing legal'} said")
        elif part.kind is PartKind.SOFT and not answer.extension:
            found.append(f"{part.name}: no <extension>")
        elif part.kind is PartKind.SOFT:
            found.append(f"{part.name}: {_criteria(part.name, score)}")
        elif part.kind is PartKind.LENGTH and score.parts[part.name] < 0:
            found.append(f"{part.name}: {item.tokens} tokens")
    return "; ".join(found)


def _criteria(part: str, score: Score) -> str:
    found = {key.removeprefix(f"{part}/"): value for key, value in score.extra.items() if key.startswith(f"{part}/")}
    capped = found.pop(CAPPED, False)
    return ", ".join(f"{key} {value:g}" for key, value in found.items()) + (" (capped: stock phrase)" if capped else "")


def table(composite: Composite, items: Sequence[RewardItem], scores: Sequence[Score]) -> Table:
    """One row an answer: truth, prediction, parts, total."""
    made = Table()
    for column in ("#", "truth", "said", *(f"{p.name} x{p.weight:g}" for p in composite.parts), "total"):
        made.add_column(column, overflow="fold")
    for number, (item, score) in enumerate(zip(items, scores, strict=True)):
        parts = [f"{score.parts[p.name]:.3g}" if p.name in score.parts else "" for p in composite.parts]
        total = f"{score.total:.4g}" if score.is_ok else "failed"
        made.add_row(*map(escape, (str(number), item.prompt.ground_truth, score.prediction or "", *parts, total)))
    return made


def judge_options(arguments: Sequence[str]) -> dict[str, Any]:
    """`--judge.key=value` or `--judge.key value`, values as in yaml. Raises ValueError on anything else."""
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--judge."):
            raise ValueError(f"unknown option {name}; see --help")
        if not equals:
            if not rest:
                raise ValueError(f"{name} needs a value")
            value = rest.pop(0)
        found[name.removeprefix("--judge.")] = yaml.safe_load(value)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="a task of verl/timeseries/tasks, such as ctu or emg")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--format", default="loose", choices=("loose", "strict"))
    parser.add_argument("--parts", default="{}", help="changes to the task's parts, as yaml: '{length: {buffer: 64}}'")
    parser.add_argument("--no-judge", action="store_true", help="leave the judge's part out")
    args, rest = parser.parse_known_args(arguments)
    try:
        task, options = get_task(args.task), judge_options(rest)
        parts = yaml.safe_load(args.parts)
        if not isinstance(parts, Mapping):
            raise ValueError(f"--parts {args.parts}: give parts by name, such as '{{length: {{buffer: 64}}}}'")
        asks = any(part.kind is PartKind.SOFT for part in task.reward) and not args.no_judge
        if options and not asks:
            raise ValueError(f"--judge options have no effect: {args.task} asks no judge here")
        _show(task.data_source, args, parts, options if asks else None)
    except (ValueError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _show(
    data_source: str, args: argparse.Namespace, parts: Mapping[str, Any], judge: Mapping[str, Any] | None
) -> None:
    items = read_items(args.file, data_source)
    manager = RewardManager(max_failure_rate=1.0, answer_format=args.format, judge=judge, parts=parts)
    manager.check_prompts(item.prompt for item in items)
    composite = manager.composite(data_source)
    unmeasured = [number for number, item in enumerate(items) if item.tokens is None]
    if unmeasured and any(part.kind is PartKind.LENGTH for part in composite.parts):
        raise ValueError(f"--file {args.file}: answer {unmeasured[0]} has no tokens, which a length part needs")
    scores = manager.score_unchecked(items)
    Console().print(table(composite, items, scores))
    for number, (item, score) in enumerate(zip(items, scores, strict=True)):
        if why := reasons(composite, item, score):
            print(f"{number}: {why}")
    ok = [score.total for score in scores if score.is_ok]
    mean = f"mean {sum(ok) / len(ok):.4g}" if ok else "no mean"
    print(f"{len(ok)} of {len(scores)} scored, {mean}")


if __name__ == "__main__":
    sys.exit(main())
