"""Invariants of declared parts and the composite reward."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from verl.protocol import Score
from verl.timeseries import get_task
from verl.utils.reward_score import ctu, emg, get_scorer
from verl.utils.reward_score.composite import Composite
from verl.utils.reward_score.judge import JudgeError, JudgeRequest, Verdict
from verl.utils.reward_score.labels import LabelScorer
from verl.utils.reward_score.length import RESPONSE_TOKENS, overlong
from verl.utils.reward_score.parts import PUBLISHED, PartKind, RewardPart, check_parts, merge_parts
from verl.utils.reward_score.returns import FailureKind
from verl.utils.reward_score.tags import AnswerFormat

TEXTS = (
    "<think>a</think><class>{}</class>",
    "<class> {} </class>",
    "<class>{}</class><class>Laptop</class>",
    "{}",
    "<think>a</think><class>{}</class> and more",
    "<think></think><class>{}</class>",
)


class StubJudge:
    """Gives one number, or fails."""

    def __init__(self, value: float | None = 0.6) -> None:
        self.value = value
        self.asked: list[JudgeRequest] = []

    async def judge(self, request: JudgeRequest) -> Verdict:
        self.asked.append(request)
        if self.value is None:
            raise JudgeError(FailureKind.SERVER_ERROR, "down")
        return Verdict({"depth": self.value}, self.value, False)


def composite(overrides: dict[str, Any], **kwargs: Any) -> Composite:
    return Composite(ctu.SCORER, merge_parts(PUBLISHED, overrides), **kwargs)


def emg_score(text: str, judge: StubJudge, truth: str = "Myopathy") -> Score:
    return asyncio.run(Composite(emg.SCORER, get_task("emg").reward, judge=judge).score(text, truth, {}))


@pytest.mark.parametrize("rule", list(AnswerFormat))
def test_published_parts_give_the_published_numbers(rule: AnswerFormat) -> None:
    scorer = get_scorer("computer_dataset", rule)
    reward = Composite(scorer, PUBLISHED)
    for text, said, truth in itertools.product(TEXTS, ("Desktop", "laptop", "Tablet"), ("Desktop", "Laptop")):
        answer = text.format(said)
        total, well_formed, pred, true = scorer(answer, truth)
        found = reward.score_now(answer, truth, {})
        assert found.total == total, answer
        assert found.parts == {"format": float(well_formed), "label": float(pred == true)}, answer
        assert found.prediction == (None if pred < 0 else scorer.classes[pred]), answer


@pytest.mark.parametrize(
    ("text", "total", "parts"),
    [
        ("<think>a</think><class>Myopathy</class><extension>biopsy</extension>", 0.1 + 0.9 + 0.5 * 0.6, 0.6),
        ("<think>a</think><class>Healthy</class><extension>biopsy</extension>", 0.1, None),
        ("<think>a</think><class>Myopathy</class>", 1.0, 0.0),
        ("Myopathy <extension>biopsy</extension>", 0.0, None),
    ],
)
def test_soft_counts_only_where_class_and_format_are_right(text: str, total: float, parts: float | None) -> None:
    judge = StubJudge()
    found = emg_score(text, judge)
    assert found.total == total and found.parts.get("soft") == parts
    assert len(judge.asked) == (1 if parts == 0.6 else 0)


def test_a_judge_that_fails_fails_the_answer_and_is_no_zero() -> None:
    found = emg_score("<think>a</think><class>Myopathy</class><extension>x</extension>", StubJudge(None))
    assert found.reason == "server_error: down"


def test_synonyms_count_as_their_label() -> None:
    reward = composite({"label": {"synonyms": {"notebook": "Laptop"}}})
    found = reward.score_now("<class>Notebook</class>", "Laptop", {})
    assert (found.total, found.prediction) == (1.0, "Laptop")


def test_case_matters_when_asked_for() -> None:
    strict = composite({"label": {"case": True}})
    assert strict.score_now("<class>laptop</class>", "Laptop", {}).total == 0.0
    assert strict.score_now("<class>Laptop</class>", "Laptop", {}).total == 1.0


def test_format_and_label_may_follow_different_rules() -> None:
    reward = composite({"format": {"rule": "strict"}, "label": {"rule": "loose"}})
    assert reward.score_now("oh <class>Laptop</class>", "Laptop", {}).total == 0.9


@pytest.mark.parametrize(("tokens", "value"), [(1, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (130, -1.0)])
def test_overlong_is_daposs_soft_punishment(tokens: int, value: float) -> None:
    assert overlong(tokens, max_tokens=100, buffer=20) == value
    reward = composite({"length": {"weight": 0.5, "buffer": 20}}, max_tokens=100)
    found = reward.score_now("<class>Laptop</class>", "Laptop", {RESPONSE_TOKENS: tokens})
    assert found.total == 1.0 + 0.5 * value and found.parts["length"] == value


def test_a_condition_leaves_a_part_out_and_a_null_drops_it() -> None:
    reward = composite({"length": {"buffer": 5, "when": "label"}, "format": None}, max_tokens=10)
    assert dict(reward.score_now("<class>Desktop</class>", "Laptop", {}).parts) == {"label": 0.0}


def test_a_part_may_stand_before_another_and_decide_whether_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def compute_score(solution_str):\n    return {'score': 'um' not in solution_str, 'acc': 7}\n")
    clean = {"kind": "custom", "path": str(path), "weight": 0.0, "before": "soft"}
    judge, soft = StubJudge(), {"when": ["label", "format", "clean"]}
    parts = merge_parts(get_task("emg").reward, {"clean": clean, "soft": soft})
    assert [part.name for part in parts] == ["format", "label", "clean", "soft"]
    reward = Composite(emg.SCORER, parts, judge=judge)
    text = "<think>{}</think><class>Myopathy</class><extension>biopsy</extension>"
    plain, noisy = (asyncio.run(reward.score(text.format(word), "Myopathy", {})) for word in ("a", "um"))
    assert (plain.total, noisy.total) == (1.3, 1.0) and "soft" not in noisy.parts and len(judge.asked) == 1
    # Under the part's own name: a bare acc would stand for the accuracy of the answer.
    assert plain.extra["clean/acc"] == 7 and plain.extra["soft/depth"] == 0.6 and "acc" not in plain.extra


def test_a_custom_part_adds_its_number_and_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def words(solution_str, least):\n    return float(len(solution_str.split()) >= least)\n")
    part = {"kind": "custom", "path": str(path), "function": "words", "weight": 0.25, "reward_kwargs": {"least": 2}}
    reward = composite({"words": part})
    assert reward.score_now("well, <class>Laptop</class>", "Laptop", {}).total == 1.25
    path.write_text("def words(solution_str, least):\n    raise RuntimeError('no')\n")
    failed = composite({"words": part}).score_now("<class>Laptop</class>", "Laptop", {})
    assert failed.reason == "exception: RuntimeError: no"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"labl": {"weight": 1}}, r"reward.parts.labl.kind='labl': use one of format, label"),
        ({"label": {"wieght": 1}}, r"unknown key reward.parts.label.wieght: did you mean 'weight'"),
        ({"label": {"weight": "x"}}, r"reward.parts.label.weight='x'"),
        ({"label": 3}, r"reward.parts.label=3: give settings"),
        ({"label": {"kind": "format"}}, r"the task declares it as label"),
        ({"more": None}, r"reward.parts.more=null: there is no such part"),
        ({"length": {"when": "soft"}}, r"reward.parts.length.when=soft: no earlier part"),
        ({"format": None, "label": None}, r"at least one part"),
        (
            {"length": {"before": "soft"}},
            r"reward.parts.length.before=soft: there is no such part; parts: format, label",
        ),
        ({"label": {"before": "label"}}, r"reward.parts.label.before=label: there is no such part"),
        ({"format": {"when": "label"}}, r"reward.parts.format.when=label: no earlier part"),
        ({"label": {"when": 3}}, r"reward.parts.label.when=3: give the name of a part"),
    ],
)
def test_a_mistake_in_the_parts_names_its_key(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_parts(PUBLISHED, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"length": {"buffer": 200}}, r"reward.parts.length: buffer=200 must lie between 1 and max_tokens=100"),
        ({"soft": {}}, r"reward.parts.soft asks a judge"),
        ({"mine": {"kind": "custom"}}, r"reward.parts.mine.path=None"),
        ({"format": {"rule": "stern"}}, r"'stern' of a format part"),
        ({"label": {"synonyms": {"a": "Tablet"}}}, r"synonym 'a' stands for 'Tablet'"),
    ],
)
def test_parts_that_cannot_work_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composite(overrides, max_tokens=100)


def test_a_soft_part_needs_an_extension_and_a_rubric() -> None:
    with pytest.raises(ValueError, match="asks for no <extension>"):
        composite({"soft": {}}, judge=StubJudge())
    scorer = LabelScorer("mine", ("A", "B"), extension=True)
    with pytest.raises(ValueError, match=r"soft.rubric=None: give name, task and criteria"):
        Composite(scorer, merge_parts(PUBLISHED, {"soft": {}}), judge=StubJudge())


RUBRIC = {"name": "r", "task": "t", "criteria": {"depth": "deep"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": {}}, r"soft.rubric: criteria are \[\]: give at least one"),
        ({"cap": 2}, r"soft.rubric: cap=2"),
        ({"stock_phrases": ["x"]}, r"soft.rubric: stock_phrases need stock_field"),
        ({"stock_phrases": ["x"], "stock_field": "answer"}, r"stock_field='answer': use one of reasoning, class, ext"),
        ({"critiera": 1}, r"soft.rubric: .*critiera"),
    ],
)
def test_a_rubric_of_the_config_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Composite(emg.SCORER, merge_parts(PUBLISHED, {"soft": {"rubric": RUBRIC | changes}}), judge=StubJudge())


def test_a_rubric_of_the_config_decides_what_the_judge_is_asked() -> None:
    judge = StubJudge()
    rubric = RUBRIC | {"stock_phrases": ["see a doctor"], "stock_field": "extension", "cap": 0.2}
    reward = Composite(emg.SCORER, merge_parts(PUBLISHED, {"soft": {"rubric": rubric}}), judge=judge)
    asyncio.run(reward.score("<class>Myopathy</class><extension>See a doctor!</extension>", "Myopathy", {}))
    (asked,) = judge.asked
    assert asked.rubric.criteria == (("depth", "deep"),)
    assert asked.rubric.score({"depth": 0.9}, asked.fields) == (0.2, True)


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="is taken"):
        check_parts([*PUBLISHED, RewardPart(name="label", kind=PartKind.LABEL)])
