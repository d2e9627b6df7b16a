"""How many tokens a prompt has, as a plot and as digits, per task.

    python3 -m verl.timeseries.tokens --data data [--tokenizer MODEL_FOLDER] [--rows 64]

Reads `<data>/<task>_numeric/test.parquet` (made with modality=numeric); a task without it gets its image tokens only.
The tokenizer is, in this order: --tokenizer, Qwen2.5-VL-3B-Instruct in the local Hugging Face cache or in
checkpoints/, and none: then the digits are counted in characters, and the table says so. Nothing is downloaded.

Invariants
- Image tokens come from the style alone: nothing is drawn.
- Both sides count the whole prompt but the chat template: image or digits, question, answer format.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from verl.timeseries.task import IMAGE, TaskSpec
from verl.timeseries.tasks import get_task

REAL = "Qwen/Qwen2.5-VL-3B-Instruct"
LOCAL = (REAL, f"checkpoints/{REAL.rsplit('/', 1)[1]}")
VISION_MARKS = 2
"""The start and the end of the vision block."""
PUBLISHED = ("ctu", "emg", "ecg", "har", "rcw", "tee")

Count = Callable[[str], int]


@dataclass(frozen=True)
class TokenRow:
    """Counts of one task. `numeric` is (mean, maximum) over the rows looked at, None without numeric data."""

    task: str
    vision: int
    text: int | None
    """Question and answer format beside the plot; None without a tokenizer."""
    numeric: tuple[float, int] | None
    rows: int

    @property
    def image(self) -> int | None:
        """The whole image prompt."""
        return None if self.text is None else self.vision + VISION_MARKS + self.text

    @property
    def ratio(self) -> float | None:
        """Numeric over image."""
        return None if self.numeric is None or self.image is None else self.numeric[0] / self.image


def open_tokenizer(folder: str | None) -> tuple[Count | None, str]:
    """A counter and what it is. Raises ValueError when the named folder holds no tokenizer."""
    from transformers import AutoTokenizer

    for name in (folder,) if folder is not None else LOCAL:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            if folder is not None:
                raise ValueError(f"--tokenizer {folder}: no tokenizer there ({str(error).splitlines()[0]})") from error
            continue
        return functools.partial(_count, tokenizer), str(name)
    return None, f"no tokenizer at hand ({REAL} is neither cached nor in checkpoints/; name a folder with --tokenizer)"


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def numeric_prompts(folder: Path, rows: int) -> list[str]:
    """The first prompts of the test part; empty without the folder."""
    import pyarrow.parquet as pq

    path = folder / "test.parquet"
    if not path.is_file():
        return []
    column = pq.read_table(path, columns=["prompt"]).slice(0, rows)["prompt"].to_pylist()
    return [turn["content"] for messages in column for turn in messages]


def token_row(task: TaskSpec, data: Path, count: Count | None, rows: int) -> TokenRow:
    """Without a counter, numeric counts are characters."""
    text = None if count is None else count(task.prompt_text.removeprefix(IMAGE))
    lengths = [(count or len)(prompt) for prompt in numeric_prompts(data / f"{task.name}_numeric", rows)]
    numeric = (float(np.mean(lengths)), max(lengths)) if lengths else None
    return TokenRow(task.name, task.plot.vision_tokens, text, numeric, len(lengths))


def table(found: Sequence[TokenRow], *, counted: bool) -> str:
    """Markdown."""
    unit = "tokens" if counted else "characters"
    lines = [
        f"| task | vision tokens | image prompt, tokens | numeric prompt, {unit} (max) | numeric / image | rows |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        image = "" if row.image is None else str(row.image)
        numeric = "not built" if row.numeric is None else f"{row.numeric[0]:.0f} ({row.numeric[1]})"
        ratio = "" if row.ratio is None else f"{row.ratio:.1f}"
        lines.append(f"| {row.task} | {row.vision} | {image} | {numeric} | {ratio} | {row.rows or ''} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--tokenizer", help="folder of a tokenizer, such as a model folder")
    parser.add_argument("--rows", type=int, default=64, help="test rows that are looked at")
    parser.add_argument("--tasks", nargs="+", default=list(PUBLISHED))
    args = parser.parse_args(arguments)
    try:
        count, name = open_tokenizer(args.tokenizer)
        found = [token_row(get_task(task), args.data, count, args.rows) for task in args.tasks]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found, counted=count is not None))
    print(f"tokenizer: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
