"""Invariants of `verl.utils.reward_score.tags`."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from verl.utils.reward_score.tags import AnswerFormat, label_table, parse_answer

LOOSE, STRICT = AnswerFormat.LOOSE, AnswerFormat.STRICT
TABLE = label_table(("Desktop", "Laptop"))
GOOD = "<think>flat</think><class>Desktop</class>"

# (answer, label under the loose rule, label under the strict rule, well formed under the strict rule)
ODD_ANSWERS = {
    "plain": (GOOD, "Desktop", "Desktop", True),
    "white space around": (f"\n {GOOD}\n\t", "Desktop", "Desktop", True),
    "white space between": ("<think>a</think>\n\n<class> Laptop\n</class>", "Laptop", "Laptop", True),
    "label in capitals": ("<think>a</think><class>LAPTOP</class>", "Laptop", "Laptop", True),
    "no think": ("<class>Laptop</class>", "Laptop", None, False),
    "empty think": ("<think> </think><class>Laptop</class>", "Laptop", None, False),
    "unclosed think": ("<think>a<class>Laptop</class>", "Laptop", None, False),
    "two thinks": ("<think>a</think><think>b</think><class>Laptop</class>", "Laptop", None, False),
    "two classes": (f"{GOOD}<class>Laptop</class>", "Desktop", None, False),
    "class inside think": ("<think><class>Laptop</class></think><class>Desktop</class>", "Laptop", None, False),
    "capital class inside think": ("<think><CLASS>Laptop</CLASS></think><class>Desktop</class>", "Laptop", None, False),
    "wrong order": ("<class>Laptop</class><think>a</think>", "Laptop", None, False),
    "text before": (f"Sure: {GOOD}", "Desktop", None, False),
    "text after": (f"{GOOD} I am certain.", "Desktop", None, False),
    "text between": ("<think>a</think>so<class>Laptop</class>", "Laptop", None, False),
    "illegal label": ("<think>a</think><class>Tablet</class>", None, None, True),
    "both labels in one tag": ("<think>a</think><class>Desktop or Laptop</class>", None, None, True),
    "illegal, then legal": ("<think>a</think><class>x</class><class>Laptop</class>", "Laptop", None, False),
    "empty class": ("<think>a</think><class> </class>", None, None, False),
    "unclosed class": ("<think>a</think><class>Laptop", None, None, False),
    "no tags": ("Laptop", None, None, False),
    "empty": ("", None, None, False),
    "extension nobody asked for": (f"{GOOD}<extension>rest</extension>", "Desktop", None, False),
    "blanks inside a tag": ("<think>a</think>< class >Laptop</ class >", None, None, False),
    "look-alike letter in the tag": ("<think>a</think><cla\u017fs>Laptop</cla\u017fs>", None, None, False),
    "zero-width space in the label": ("<think>a</think><class>Lap\u200btop</class>", None, None, True),
    "escaped tags": ("&lt;think&gt;a&lt;/think&gt;&lt;class&gt;Laptop&lt;/class&gt;", None, None, False),
}


@pytest.mark.parametrize("case", ODD_ANSWERS)
def test_odd_answers_are_read_as_the_table_says(case: str) -> None:
    text, loose, strict, well_formed = ODD_ANSWERS[case]
    assert parse_answer(text, TABLE, LOOSE).label == loose
    answer = parse_answer(text, TABLE, STRICT)
    assert (answer.label, answer.well_formed) == (strict, well_formed)


@pytest.mark.parametrize("case", ODD_ANSWERS)
def test_an_end_token_left_at_the_end_changes_nothing(case: str) -> None:
    text = ODD_ANSWERS[case][0]
    for rule in AnswerFormat:
        for tail in ("<|im_end|>", "<|im_end|>\n<|endoftext|>"):
            assert parse_answer(text + tail, TABLE, rule).label == parse_answer(text, TABLE, rule).label
            assert parse_answer(text + tail, TABLE, rule).well_formed == parse_answer(text, TABLE, rule).well_formed


def test_strict_wants_the_extension_of_a_task_that_asks_for_it() -> None:
    with_extension = f"{GOOD}\n<extension> rest </extension>"
    answer = parse_answer(with_extension, TABLE, STRICT, extension=True)
    assert (answer.well_formed, answer.label, answer.think, answer.extension) == (True, "Desktop", "flat", "rest")
    for text in (GOOD, f"{GOOD}<extension></extension>", f"<extension>rest</extension>{GOOD}", f"{with_extension}."):
        assert not parse_answer(text, TABLE, STRICT, extension=True).well_formed


def test_loose_reads_think_and_extension_where_they_are() -> None:
    answer = parse_answer(f"{GOOD} then <extension>rest</extension>", TABLE, LOOSE)
    assert (answer.think, answer.extension) == ("flat", "rest")
    assert parse_answer("<class>Laptop</class>", TABLE, LOOSE).think is None


@pytest.mark.parametrize(
    "text",
    ["<class>" * 60_000, "<class> " * 60_000, "<think>" * 60_000, "<class>" + " " * 400_000, "<|im_end|>" * 40_000],
)
def test_hostile_lengths_take_linear_time(text: str) -> None:
    start = time.perf_counter()
    for rule in AnswerFormat:
        assert parse_answer(text, TABLE, rule).label is None
    assert time.perf_counter() - start < 2.0


PIECES = ["<think>", "</think>", "<class>", "</class>", "a", " ", "Laptop", "<think>a</think>", "<class>Laptop</class>"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
@example(GOOD)
def test_strict_well_formed_implies_the_loose_label(text: str) -> None:
    strict, loose = parse_answer(text, TABLE, STRICT), parse_answer(text, TABLE, LOOSE)
    assert {strict.label, loose.label} <= {None, "Desktop", "Laptop"}
    if strict.well_formed:
        assert strict.label == loose.label
        assert text.count("<class>") == text.count("<think>") == 1


@pytest.mark.parametrize("labels", [(), ("a", "A "), ("",), ("<b>",)])
def test_labels_that_no_answer_could_tell_apart_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="label"):
        label_table(labels)
