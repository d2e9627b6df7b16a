"""Invariants of the task scorers and their registry."""

import pytest

from verl.timeseries import get_task, task_names
from verl.utils.reward_score import _default_compute_score, ctu, get_scorer, known_classes
from verl.utils.reward_score.labels import LabelScorer

GOOD = "<think>a</think><class>{}</class>"


def test_ctu_gives_the_published_rewards() -> None:
    assert ctu.compute_score(GOOD.format("Desktop"), "Desktop") == (1.0, 1, 0, 0)
    assert ctu.compute_score("noise <CLASS> laptop </CLASS> noise", "Laptop") == (1.0, 1, 1, 1)
    assert ctu.compute_score(GOOD.format("Laptop"), "Desktop") == (0.1, 1, 1, 0)


def test_an_unreadable_answer_is_no_class_and_earns_nothing() -> None:
    assert ctu.compute_score("I think Desktop", "Laptop") == (0.0, 0, -1, 1)


def test_strict_gives_nothing_to_a_right_label_in_a_broken_format() -> None:
    scorer = get_scorer("computer_dataset", format="strict")
    assert scorer(GOOD.format("Laptop"), "Laptop") == (1.0, 1, 1, 1)
    assert scorer("<class>Laptop</class>", "Laptop") == (0.0, 0, -1, 1)
    assert get_scorer("computer_dataset", format="loose")("<class>Laptop</class>", "Laptop") == (1.0, 1, 1, 1)


def test_strict_pays_the_format_of_an_illegal_label_and_names_no_class() -> None:
    assert get_scorer("computer_dataset", "strict")(GOOD.format("Tablet"), "Laptop") == (0.1, 1, -1, 1)


def test_an_unknown_ground_truth_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"'Tablet' is not a label of computer_dataset: Desktop, Laptop"):
        ctu.compute_score(GOOD.format("Laptop"), "Tablet")


def test_the_dispatcher_gives_the_fork_tuple() -> None:
    reward, valid, pred, true = _default_compute_score(
        data_source="computer_dataset",
        solution_str=GOOD.format("Laptop"),
        ground_truth="Laptop",
        extra_info={"index": 1},
    )
    assert (reward, valid, pred, true) == (1.0, 1, 1, 1)


def test_every_published_source_has_the_published_labels_in_id_order() -> None:
    assert {source: known_classes(source) for source in PUBLISHED_LABELS} == PUBLISHED_LABELS


PUBLISHED_LABELS = {
    "computer_dataset": ("Desktop", "Laptop"),
    "emg_dataset": ("Healthy", "Myopathy", "Neuropathy"),
    "ecg_dataset": ("normal sinus rhythm", "atrial fibrillation", "other cardiac rhythms", "noise"),
    "har_dataset": ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING"),
    "rcw_dataset": ("RightWhale", "NoWhale"),
    "lightning_dataset": (
        "CG Positive",
        "IR Negative",
        "Subsequent Return Stroke",
        "Impulsive",
        "Impulsive Pair",
        "Gradual Intra-Cloud",
        "Off-record",
    ),
}


def test_an_unregistered_source_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'my_data' is not registered: set custom_reward_function.path"):
        _default_compute_score("my_data", "x", "y")
    assert known_classes("my_data") is None


@pytest.mark.parametrize("name", task_names())
def test_every_task_scores_a_right_a_wrong_and_a_broken_answer(name: str) -> None:
    task = get_task(name)
    scorer = get_scorer(task.data_source)
    assert scorer.classes == task.classes
    assert scorer.extension == ("<extension>" in task.answer_format)
    first, last = task.classes[0], task.classes[-1]
    assert scorer(GOOD.format(first), first) == (1.0, 1, 0, 0)
    assert scorer(GOOD.format(last), first) == (0.1, 1, len(task.classes) - 1, 0)
    assert scorer("no idea", first) == (0.0, 0, -1, 0)


def test_an_unknown_format_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'stern'.*loose, strict"):
        get_scorer("computer_dataset", format="stern")


def test_labels_of_several_words_are_read_whole() -> None:
    scorer = LabelScorer("ecg", ("normal sinus rhythm", "noise"))
    assert scorer("<class>Normal Sinus Rhythm</class>", "normal sinus rhythm") == (1.0, 1, 0, 0)
    assert scorer("<class>normal</class>", "normal sinus rhythm") == (0.0, 0, -1, 0)
