"""The rule reward of a classification task: 0.9 for the right label, 0.1 for the format (as TimeMaster released it).

Invariants
- The reward is 1.0 for a right well-formed answer and 0 for one that breaks the chosen format.
- An answer without a legal label has the id -1, never the id of another class.
- A ground truth that is not a label of the task is an error, never a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from verl.utils.reward_score.tags import AnswerFormat, ParsedAnswer, fold, label_table, parse_answer

LABEL_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1
UNPARSED_ID = -1

ScoreTuple = tuple[float, int, int, int]
"""(reward, format 0 or 1, id of the predicted label or -1, id of the true label)."""


@dataclass(frozen=True)
class LabelScorer:
    """Scores the answers of one task; ids are places in `classes`.

    Raises ValueError when the classes cannot be told apart (see `label_table`).
    Example: `LabelScorer("a", ("Desktop", "Laptop"))("<class>laptop</class>", "Laptop") == (1.0, 1, 1, 1)`
    """

    data_source: str
    classes: tuple[str, ...]
    answer_format: AnswerFormat = AnswerFormat.LOOSE
    extension: bool = False
    """The task asks for an `<extension>`; only the strict rule looks for it."""
    synonyms: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Further spelling -> label."""
    case: bool = False
    """Letter case of the answer's label matters."""
    _table: dict[str, str] = field(init=False, repr=False, compare=False)
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_table", label_table(self.classes, self.synonyms, case=self.case))
        object.__setattr__(self, "_ids", {fold(label): i for i, label in enumerate(self.classes)})

    def label_id(self, ground_truth: str) -> int:
        """Place of the true label. Raises ValueError naming the value and the legal ones."""
        found = self._ids.get(fold(ground_truth))
        if found is None:
            raise ValueError(
                f"ground truth {ground_truth!r} is not a label of {self.data_source}: {', '.join(self.classes)}; "
                "correct reward_model.ground_truth of the row or the task's classes"
            )
        return found

    def read(self, predict_str: str) -> ParsedAnswer:
        """The parts of an answer, by the task's labels and the chosen format."""
        return parse_answer(predict_str, self._table, self.answer_format, extension=self.extension, case=self.case)

    def __call__(self, predict_str: str, ground_truth: str) -> ScoreTuple:
        label_id = self.label_id(ground_truth)
        answer = self.read(predict_str)
        pred_id = UNPARSED_ID if answer.label is None else self._ids[fold(answer.label)]
        reward = LABEL_WEIGHT * (pred_id == label_id) + FORMAT_WEIGHT * answer.well_formed
        return reward, int(answer.well_formed), pred_id, label_id
