"""Invariants of M-RoPE positions: the library's own, and answers that start after the largest of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import ODD, SMALL, WIDE, WINDOW, Maker
from transformers import Qwen2_5_VLForConditionalGeneration

from verl.packing.positions import image_spans, mrope_positions

IMAGE = 9  # any id, for tests of the spans alone


@pytest.fixture(scope="module")
def library(tiny_folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32).model


def library_positions(library, prompt) -> tuple[np.ndarray, int]:
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    positions, delta = library.get_rope_index(
        ids,
        image_grid_thw=torch.tensor(prompt.image_grids) if prompt.image_grids else None,
        mm_token_type_ids=(ids == library.config.image_token_id).int(),
    )
    return positions[:, 0].numpy(), int(delta) + ids.shape[1]


@pytest.mark.parametrize(
    "grids",
    [(), (WIDE,), (SMALL,), (WINDOW, ODD), (SMALL, WIDE, ODD), ((1, 2, 2),), ((1, 2, 40), (1, 40, 2))],
    ids=str,
)
def test_positions_equal_the_librarys(grids, library, make: Maker) -> None:
    for text in (1, 2, 9):
        prompt = make.prompt(*grids, text=text)
        positions, following = mrope_positions(prompt.token_ids, grids, library.config.image_token_id, 2)
        expected, expected_next = library_positions(library, prompt)
        np.testing.assert_array_equal(positions, expected)
        assert following == expected_next == positions.max() + 1


def test_a_prompt_that_ends_with_an_image_starts_its_answer_after_the_largest_side(library, make: Maker) -> None:
    ids = np.array([1, 2, *[IMAGE] * 15], np.int32)  # 3 rows of 5 merged patches, from position 2 on
    positions, following = mrope_positions(ids, [SMALL], IMAGE, 2)
    assert positions[:, -1].tolist() == [2, 4, 6] and following == 7


def test_positions_of_a_small_case_made_by_hand() -> None:
    ids = np.array([1, IMAGE, IMAGE, 1], np.int32)
    positions, following = mrope_positions(ids, [(1, 2, 4)], IMAGE, 2)
    assert positions.tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]] and following == 4


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6)), max_size=4), st.integers(0, 3))
@settings(max_examples=50)
def test_spans_cover_exactly_the_placeholders_in_order(images: list[tuple[int, int, int]], tail: int) -> None:
    ids: list[int] = []
    for text, rows, columns in images:
        ids += [1] * text + [IMAGE] * (rows * columns)
    tokens = np.array(ids + [1] * tail, np.int32)
    spans = image_spans(tokens, [(1, 2 * rows, 2 * columns) for _, rows, columns in images], IMAGE, 2)
    covered = [i for low, high in spans for i in range(low, high)]
    assert covered == np.flatnonzero(tokens == IMAGE).tolist()
    assert [high - low for low, high in spans] == [rows * columns for _, rows, columns in images]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, 9, 9, 1], [(1, 4, 4)], "2 image placeholder tokens but the images need .4. .sum 4"),
        ([1, 9, 1], [], "1 image placeholder tokens but the images need .. .sum 0"),
        ([1, 1], [(1, 2, 2)], "0 image placeholder tokens but the images need .1."),
        ([9, 1, 9], [(1, 2, 4)], "2 placeholders of the image at token 0 are not contiguous"),
        ([9, 9, 1, 9, 9, 9], [(1, 2, 6), (1, 2, 4)], "3 placeholders of the image at token 0 are not contiguous"),
    ],
)
def test_placeholders_that_do_not_fit_the_grids_are_an_error_with_both_counts(ids, grids, message) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(np.array(ids, np.int32), grids, IMAGE, 2)
