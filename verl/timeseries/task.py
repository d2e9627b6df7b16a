"""What a task declares, and the texts made from it.

Invariants
- A class has one name and one label in the archive; neither repeats (names are compared without case).
- The prompt holds exactly one `<image>`, at its start, and names every class.
- A `TaskSpec` is a value: reading files is left to its `reader`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.timeseries.numeric import NumericFormat, digits, statement
from verl.timeseries.readers import Reader, Series
from verl.timeseries.style import PlotStyle
from verl.utils.reward_score.parts import PUBLISHED, RewardPart, check_parts

IMAGE = "<image>"
NUMBERS = {"The plot": "The series of numbers", "the plot": "the series of numbers"}
"""How questions name the picture -> what stands there in the numeric modality; whole words only."""
_PLOT = re.compile(rf"\b({'|'.join(NUMBERS)})\b")


class DescriptionStyle(enum.Enum):
    """How long the reasoning text of a supervised example is."""

    FULL = "full"
    """Six short sentences."""
    SHORT = "short"
    """About 12 to 20 words: what a model of a few million parameters can learn to write."""


@dataclass(frozen=True)
class ClassSpec:
    """One class: the name the model answers with, the label in the archive's files, one line that describes it."""

    name: str
    file_label: str
    hint: str = ""
    also: tuple[str, ...] = ()
    """Further spellings of the label, in other formats of the same archive."""


@dataclass(frozen=True)
class Suggestion:
    """What a supervised answer suggests for a class, by how large the signal is.

    `weak` is said below a peak of `strong_from`, `strong` from there on.
    """

    weak: str
    strong: str
    then: str
    """Said in both cases."""
    strong_from: float
    """Peak amplitude in the unit of the plot."""


@dataclass(frozen=True)
class Download:
    """Where the archive comes from, and the SHA-256 of files inside it that are known."""

    url: str
    """A zip, or a folder (ending in /) with the files by name."""
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Empty: the published checksums are not known."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task. Example: `verl/timeseries/tasks/ctu.py`.

    Raises ValueError when the declaration contradicts itself.
    """

    name: str
    data_source: str
    class_specs: tuple[ClassSpec, ...]
    """In id order."""
    question: str
    answer_format: str
    reader: Reader
    plot: PlotStyle
    channels: int
    length: int | None
    """Points per series; None where rows differ in length."""
    rows: tuple[int, int] | None
    """Rows of (train, test) in the whole archive: what tells a cut-off file from a complete one. None: the reader has
    another way to tell."""
    partial: bool = False
    """Other counts than `rows` are a warning of the data step, not an error."""
    time_step: float | None = None
    """Seconds between two points, if time is the x axis."""
    unit: str = ""
    """Unit of the values, where they have one."""
    numeric: NumericFormat = field(default_factory=NumericFormat)
    """How the values are written where digits stand in place of the plot."""
    declared: bool = True
    """The task stands in the registry; else its rows carry the names of the classes, for whoever scores them."""
    overlap: float = 0.0
    """Share of a window that its neighbour repeats."""
    description: DescriptionStyle = DescriptionStyle.FULL
    suggestions: Mapping[str, Suggestion] = field(default_factory=dict, hash=False)
    """Class name -> what a supervised answer's `<extension>` says; empty where the task asks for none."""
    reward: tuple[RewardPart, ...] = PUBLISHED
    """Named parts of the reward, in order."""
    val_fraction: float = 0.2
    val_last: bool = False
    """Val is the last rows of each class in train, not drawn: for rows that are windows of one recording a class."""
    warnings: tuple[str, ...] = ()
    """What a reader of results must know; printed by the data step and kept in the data card."""
    download: Download | None = None
    licence: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        names = [spec.name.casefold() for spec in self.class_specs]
        labels = [label for spec in self.class_specs for label in (spec.file_label, *spec.also)]
        if len(names) < 2 or len(set(names)) < len(names) or len(set(labels)) < len(labels):
            raise ValueError(
                f"task {self.name}: needs two or more classes with different names and labels, got {names}"
            )
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"task {self.name}: val_fraction must lie in (0, 1), got {self.val_fraction}")
        if IMAGE in self.question + self.answer_format + "".join(spec.hint for spec in self.class_specs):
            raise ValueError(f"task {self.name}: {IMAGE} belongs to the start of the prompt only")
        if self.suggestions and set(self.suggestions) != set(self.classes):
            raise ValueError(f"task {self.name}: suggestions are for {sorted(self.suggestions)}, not for its classes")
        if self.asks_extension != bool(self.suggestions):
            raise ValueError(
                f"task {self.name}: an <extension> in the answer format needs suggestions, and they need it"
            )
        if not 0 <= self.overlap < 1:
            raise ValueError(f"task {self.name}: overlap must lie in [0, 1), got {self.overlap}")
        if self.val_last and self.overlap:
            raise ValueError(f"task {self.name}: windows that overlap need a gap before a val of the last rows")
        check_parts(self.reward)
        self.plot.panels_for(self.channels)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in id order."""
        return tuple(spec.name for spec in self.class_specs)

    def class_of(self, file_label: str, *, where: str) -> str:
        """The class name of a label as it stands in a file. Raises ValueError naming `where` when it is undeclared."""
        for spec in self.class_specs:
            if file_label == spec.file_label or file_label in spec.also:
                return spec.name
        known = ", ".join(f"{spec.file_label} ({spec.name})" for spec in self.class_specs)
        raise ValueError(f"{where}: label {file_label!r} is not declared by task {self.name}; declared: {known}")

    @property
    def asks_extension(self) -> bool:
        """Answers end with an `<extension>`."""
        return "<extension>" in self.answer_format

    @property
    def full_question(self) -> str:
        """The question with one line per class that has a hint."""
        hints = [f"- {spec.name}: {spec.hint}" for spec in self.class_specs if spec.hint]
        return "\n".join([self.question, *hints])

    @property
    def prompt_text(self) -> str:
        """The user turn: the image, the question, the answer format."""
        return f"{IMAGE}\n{self.full_question}\n{self.answer_format}"

    def numeric_question(self, length: int) -> str:
        """The question about the digits of a series of that length: of a plot it speaks as of numbers."""
        question = _PLOT.sub(lambda found: NUMBERS[found[0]], self.full_question)
        return f"{question}\n{statement(length, self.numeric)}"

    def numeric_prompt(self, series: Series) -> str:
        """The user turn with digits: series (channels, length), question, answer format."""
        text = digits(series, self.numeric, self.plot.channel_names)
        return f"{text}\n{self.numeric_question(series.shape[1])}\n{self.answer_format}"

    def messages(self, series: Series | None = None) -> list[dict[str, Any]]:
        """The `prompt` column: one user turn, no system prompt; with the digits of `series` where it is given."""
        content = self.prompt_text if series is None else self.numeric_prompt(series)
        return [{"role": "user", "content": content}]
