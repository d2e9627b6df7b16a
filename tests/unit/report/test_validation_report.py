"""Invariants of the validation report."""

import json
import math

import numpy as np
import pytest

from verl.protocol import Score
from verl.utils.report.validation import ValidationRow, check_metric_name, classification_report, validation_metrics

CLASSES = {"ctu": ("Desktop", "Laptop")}


def row(
    truth: str, pred: str | None, *, uid: str | None = None, source: str = "ctu", total: float | None = None
) -> ValidationRow:
    right = pred is not None and pred == truth
    score = Score.ok(0.9 * right + 0.1 * (pred is not None) if total is None else total, {"label": right}, pred)
    row.count = getattr(row, "count", 0) + 1  # type: ignore[attr-defined]
    return ValidationRow(uid or f"val-{row.count}", source, truth, score)  # type: ignore[attr-defined]


def failed(truth: str, reason: str = "timeout: 1 s", uid: str = "f") -> ValidationRow:
    return ValidationRow(uid, "ctu", truth, Score.failed(reason))


def table() -> list[ValidationRow]:
    """Desktop: 3 right, 1 taken for Laptop, 1 unparsed. Laptop: 2 right, 1 taken for Desktop, 2 unparsed."""
    return [
        *[row("Desktop", "Desktop") for _ in range(3)],
        row("Desktop", "Laptop"),
        row("Desktop", None),
        *[row("Laptop", "Laptop") for _ in range(2)],
        row("Laptop", "Desktop"),
        *[row("Laptop", None) for _ in range(2)],
    ]


def test_a_report_matches_numbers_made_by_hand() -> None:
    report = classification_report(table(), CLASSES)["ctu"]
    found = report.classification
    assert found is not None
    assert report.accuracy == 0.5 and report.n == report.n_prompts == 10
    assert report.standard_error == pytest.approx(math.sqrt(0.25 / 11))  # at one half, Wilson counts one row more
    assert found.confusion.tolist() == [[3, 1, 1], [1, 2, 2]]
    assert found.recall == {"Desktop": pytest.approx(0.6), "Laptop": pytest.approx(0.4)}
    # Desktop: precision 3/4, recall 3/5; Laptop: precision 2/3, recall 2/5
    assert found.macro_f1 == pytest.approx((2 * 3 / (4 + 5) + 2 * 2 / (3 + 5)) / 2)
    assert found.parse_failure_rate == pytest.approx(0.3)
    assert report.majority_share == 0.5


def test_no_fault_in_a_few_rows_is_no_certainty() -> None:
    report = classification_report([row("Desktop", "Desktop") for _ in range(4)], CLASSES)["ctu"]
    assert report.accuracy == 1.0 and report.standard_error == pytest.approx(1 / 10)  # 1 / (2 (n + 1))


def test_an_unparsed_answer_never_becomes_a_class() -> None:
    report = classification_report([row("Desktop", None)] * 4, CLASSES)["ctu"]
    assert report.classification is not None
    assert report.classification.confusion.tolist() == [[0, 0, 4], [0, 0, 0]]
    assert report.classification.macro_f1 == 0.0 and report.accuracy == 0.0
    assert report.classification.recall == {"Desktop": 0.0}


def test_a_prediction_that_names_no_class_is_unparsed() -> None:
    report = classification_report([row("Desktop", "Tablet"), row("Laptop", "laptop ")], CLASSES)["ctu"]
    assert report.classification is not None
    assert report.classification.confusion.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert report.accuracy == 0.5


def test_two_sources_with_accuracy_1_and_0_stay_apart() -> None:
    rows = [
        row("a", "a", source="one"),
        row("b", "c", source="two"),
        row("a", "a", source="one"),
        row("c", "b", source="two"),
    ]
    metrics = validation_metrics(classification_report(rows))
    assert [metrics[f"val/acc/{s}"] for s in ("one", "two")] == [1.0, 0.0]
    assert [metrics[f"val/f1_score/{s}"] for s in ("one", "two")] == [1.0, 0.0]
    assert [metrics[f"val/test_score/{s}"] for s in ("one", "two")] == [1.0, pytest.approx(0.1)]
    assert [metrics[f"val-core/{s}/acc/mean@1"] for s in ("one", "two")] == [1.0, 0.0]


def test_failed_scores_are_counted_and_enter_no_mean() -> None:
    good = [row("Desktop", "Desktop"), row("Laptop", "Desktop")]
    without = classification_report(good, CLASSES)["ctu"]
    mixed = classification_report([*good, failed("Laptop"), failed("Laptop", "exception: x", "g")], CLASSES)["ctu"]
    assert (mixed.accuracy, mixed.mean_score, mixed.n) == (without.accuracy, without.mean_score, 2)
    assert mixed.classification is not None and mixed.classification.confusion.sum() == 2
    assert mixed.failed == {"timeout": 1, "exception": 1}
    assert validation_metrics({"ctu": mixed})["val-aux/ctu/failed"] == 2


def test_without_an_ok_score_there_is_no_result() -> None:
    report = classification_report([failed("Laptop")], CLASSES)["ctu"]
    assert report.accuracy is None and report.mean_score is None and report.classification is None
    metrics = validation_metrics({"ctu": report})
    assert not [name for name in metrics if name.startswith(("val/", "val-core/"))]
    assert (metrics["val-aux/ctu/n"], metrics["val-aux/ctu/failed/timeout"]) == (0, 1)


def test_several_answers_a_prompt_give_mean_and_majority() -> None:
    rows = [
        *[row("Desktop", p, uid="p1") for p in ("Desktop", "Laptop", "Desktop")],
        *[row("Desktop", p, uid="p2") for p in (None, "Laptop", "Desktop")],
        *[row("Laptop", None, uid="p3") for _ in range(3)],
    ]
    report = classification_report(rows, CLASSES)["ctu"]
    metrics = validation_metrics({"ctu": report})
    assert metrics["val-core/ctu/acc/mean@3"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    # p1 right, p2 a tie that the first readable answer (Laptop) decides, p3 nothing readable
    assert metrics["val-aux/ctu/acc/maj@3"] == pytest.approx(1 / 3)
    assert metrics["val-aux/ctu/score/mean@3"] == pytest.approx(report.mean_score)
    share, prompts = 1 / 3, 3  # not nine answers
    wilson = math.sqrt(share * (1 - share) / prompts + 1 / (4 * prompts**2)) / (1 + 1 / prompts)
    assert report.n == 9 and report.standard_error == pytest.approx(wilson)


def test_one_answer_a_prompt_has_no_majority_metric() -> None:
    metrics = validation_metrics(classification_report(table(), CLASSES))
    assert not [name for name in metrics if "maj@" in name]


def test_a_parts_mean_is_over_the_answers_that_have_it_prompt_by_prompt() -> None:
    def judged(uid: str, source: str, soft: float | None) -> ValidationRow:
        parts = {"label": 1.0} if soft is None else {"label": 1.0, "soft": soft}
        return ValidationRow(uid, source, "Desktop", Score.ok(1.0, parts, "Desktop"))

    rows = [judged("p1", "ctu", 0.2), judged("p1", "ctu", None), judged("p2", "ctu", 0.4), judged("p2", "ctu", 0.8)]
    rows += [judged("p3", "ctu", None), judged("p4", "other", 0.9), failed("Desktop", uid="p3")]
    metrics = validation_metrics(classification_report(rows, CLASSES))
    assert metrics["val-aux/ctu/soft/mean@2"] == pytest.approx((0.2 + 0.6) / 2)
    assert metrics["val-aux/ctu/label/mean@2"] == 1.0
    assert metrics["val-aux/other/soft/mean@1"] == 0.9


def test_the_metrics_carry_verl_names() -> None:
    metrics = validation_metrics(classification_report(table(), CLASSES))
    assert set(metrics) == {
        "val/test_score/ctu",
        "val/acc/ctu",
        "val/f1_score/ctu",
        "val-core/ctu/acc/mean@1",
        "val-aux/ctu/score/mean@1",
        "val-aux/ctu/label/mean@1",
        "val-aux/ctu/acc/standard_error",
        "val-aux/ctu/n",
        "val-aux/ctu/failed",
        "val-aux/ctu/majority_share",
        "val-aux/ctu/parse_fail",
        "val-aux/ctu/recall/Desktop",
        "val-aux/ctu/recall/Laptop",
    }
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())


def test_a_function_of_bare_numbers_has_a_score_but_no_accuracy() -> None:
    rows = [ValidationRow(f"v{i}", "mine", str(i), Score.ok(0.5)) for i in range(3)]
    metrics = validation_metrics(classification_report(rows))
    assert metrics["val/test_score/mine"] == 0.5
    assert "val/acc/mine" not in metrics and "val-aux/mine/parse_fail" not in metrics


def test_the_acc_of_a_custom_function_is_the_accuracy() -> None:
    rows = [
        ValidationRow(f"v{i}", "mine", "42", Score.ok(0.0, extra={"acc": acc})) for i, acc in enumerate((True, 0.0))
    ]
    assert validation_metrics(classification_report(rows))["val/acc/mine"] == 0.5


def test_a_ground_truth_outside_the_classes_is_an_error_naming_the_row() -> None:
    with pytest.raises(ValueError, match=r"ctu, v9: ground truth 'Tablet' is none of Desktop, Laptop"):
        classification_report([ValidationRow("v9", "ctu", "Tablet", Score.ok(1.0))], CLASSES)


def test_the_report_goes_into_a_json_file() -> None:
    found = json.loads(json.dumps(classification_report(table(), CLASSES)["ctu"].as_dict()))
    assert found["classification"]["confusion"]["Laptop"] == {"Desktop": 1, "Laptop": 2, "unparsed": 2}
    assert found["accuracy"] == 0.5


def test_no_rows_give_no_report() -> None:
    assert classification_report([]) == {}


@pytest.mark.parametrize("answers", [1, 2])
def test_every_metric_that_validation_gives_is_a_known_name_before_it_runs(answers: int) -> None:
    scored = enumerate([*table(), failed("Desktop")])
    rows = [ValidationRow(f"{i // answers}", r.data_source, r.ground_truth, r.score) for i, r in scored]
    names = validation_metrics(classification_report(rows))
    sources = {r.data_source: None for r in rows}
    assert names
    for name in names:
        check_metric_name(name, sources, answers, also=())


def test_a_mistyped_metric_name_is_answered_with_the_close_one_and_all_known() -> None:
    sources = {"computer_dataset": ("Desktop", "Laptop")}
    check_metric_name("val/accuracy", sources, 4, also=("val/accuracy",))
    check_metric_name("val-aux/computer_dataset/format/mean@4", sources, 4, also=())
    wrong = {
        "val/acc/computer_datasets": "did you mean val/acc/computer_dataset?",
        "val-core/computer_dataset/acc/mean@8": "acc/mean@4",
        "val-aux/computer_dataset/recall/Tablet": "recall/Laptop",
        "accuracy": "it gives val/accuracy, val/acc/computer_dataset,",
    }
    for name, hint in wrong.items():
        with pytest.raises(ValueError, match=r"validation gives no metric") as error:
            check_metric_name(name, sources, 4, also=("val/accuracy",))
        assert name in str(error.value) and hint in str(error.value), str(error.value)
