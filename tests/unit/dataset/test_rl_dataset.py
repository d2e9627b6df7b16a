"""Parquet rows to prompts: counts that agree, lengths after expansion, errors that name the row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_samples import QUESTION, make_row, png
from transformers import PreTrainedTokenizerBase

from verl.utils.dataset.images import ImageSpec, image_key, token_count
from verl.utils.dataset.prompts import Tokens, Truncation, truncate
from verl.utils.dataset.rl_dataset import DatasetOptions, RLDataset, load_rl_dataset, load_sft_dataset
from verl.utils.dataset.rows import Columns

Write = Callable[..., Path]
SPEC = ImageSpec()


def load(files: Any, tokenizer: PreTrainedTokenizerBase, cache: Path, **options: Any) -> RLDataset:
    return load_rl_dataset(files, tokenizer, SPEC, DatasetOptions(cache_dir=cache, **options))


def test_image_tokens_equal_what_the_grids_ask_for(write: Write, tokenizer: Any, cache: Path) -> None:
    two = make_row(1, text="a <image> b <image> c", images=[{"bytes": png(1)}, {"bytes": png(2, 112, 84)}])
    data = load(write([make_row(0), two, make_row(2, text="no plot", images=None)]), tokenizer, cache)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    counts = [int((prompt.token_ids == pad).sum()) for prompt in data]
    assert counts == [6, 6 + 12, 0]
    assert [sum(token_count(g) for g in prompt.image_grids) for prompt in data] == counts
    assert data[1].image_keys == (image_key(png(1)), image_key(png(2, 112, 84)))
    assert data.images is not None and data.images[data[1].image_keys[1]].grid == data[1].image_grids[1] == (1, 6, 8)


def test_ids_equal_the_template_with_each_placeholder_expanded(write: Write, tokenizer: Any, cache: Path) -> None:
    data = load(write([make_row(0)]), tokenizer, cache)
    block = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    turns = [{"role": "user", "content": QUESTION.replace("<image>", block)}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert data[0].token_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert data[0].token_ids.dtype == np.int32
    assert text.endswith("<|im_start|>assistant\n")


def test_the_row_becomes_the_prompt(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    prompt = load(write([make_row(0), make_row(1)]), plain_tokenizer, cache)[1]
    assert (prompt.uid, prompt.row, prompt.data_source, prompt.ground_truth) == (
        "train-1",
        1,
        "computer_dataset",
        "Laptop",
    )
    assert prompt.extra_info["index"] == 1


def test_bytes_and_relative_and_absolute_paths_load_the_same_image(
    write: Write, plain_tokenizer: Any, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    dicts = [make_row(0), make_row(0, images=[{"bytes": None, "path": "images/a.png"}])]
    dicts.append(make_row(0, images=[{"bytes": None, "path": str(tmp_path / "images" / "a.png")}]))
    names = [make_row(0, images=["images/a.png"])]
    both = [write(dicts, "dicts.parquet"), write(names, "names.parquet")]
    data = load(both, plain_tokenizer, cache)
    assert {prompt.image_keys for prompt in data} == {(image_key(png(0)),)}
    assert data.images is not None and len(data.images) == 1


def test_text_only_data_has_no_store(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    rows = [{k: v for k, v in make_row(i, text="how many?").items() if k != "images"} for i in range(2)]
    data = load(write(rows), plain_tokenizer, cache)
    assert data.images is None and all(prompt.image_keys == () for prompt in data)


def test_content_parts_equal_the_literal(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": QUESTION.removeprefix("<image>")}]
    literal = load(write([make_row(0)], "literal.parquet"), plain_tokenizer, cache)
    as_parts = make_row(0, prompt=[{"role": "user", "content": parts}])
    assert np.array_equal(load(write([as_parts]), plain_tokenizer, cache)[0].token_ids, literal[0].token_ids)


@pytest.mark.parametrize(("text", "literals"), [("no literal", 0), ("<image><image> twice", 2)])
def test_a_count_mismatch_names_the_row_and_both_counts(
    write: Write, plain_tokenizer: Any, cache: Path, text: str, literals: int
) -> None:
    path = write([make_row(0), make_row(1, text=text)])
    with pytest.raises(ValueError, match=rf"train.parquet row 1: the prompt has {literals} <image> .* has 1 images"):
        load(path, plain_tokenizer, cache)


def test_a_wrong_image_key_is_a_count_mismatch_naming_the_key(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"row 0: .* column 'pictures' has 0 images.*data.image_key"):
        load(write([make_row(0)]), plain_tokenizer, cache, columns=Columns(images="pictures"))


def test_vision_tokens_spelled_in_the_text_are_refused(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    path = write([make_row(0, text=QUESTION + "<|image_pad|>")])
    with pytest.raises(ValueError, match=r"row 0: the tokenised prompt has 2 image tokens .* for 1 images"):
        load(path, plain_tokenizer, cache)


def test_a_broken_image_names_the_row(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    path = write([make_row(0), make_row(1, images=[{"bytes": png(1)[:100], "path": None}])])
    with pytest.raises(ValueError, match=r"train.parquet row 1: image cannot be decoded \(100 bytes\)"):
        load(path, plain_tokenizer, cache)


def test_a_row_that_fits_only_before_expansion_is_dropped_at_load(
    write: Write, plain_tokenizer: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write([make_row(0), make_row(1, images=[{"bytes": png(1, 588, 224), "path": None}])])
    lengths = [len(p.token_ids) for p in load(path, plain_tokenizer, cache)]
    assert lengths[1] == lengths[0] - 6 + 168
    with caplog.at_level(logging.WARNING):
        data = load(path, plain_tokenizer, cache, max_prompt_length=lengths[1] - 1, filter_overlong_prompts=True)
    assert [p.uid for p in data] == ["train-0"] and data.dropped == 1
    assert "dropped 1 of 2 rows over data.max_prompt_length" in caplog.text


def test_an_overlong_row_is_an_error_naming_row_length_and_keys(
    write: Write, plain_tokenizer: Any, cache: Path
) -> None:
    path = write([make_row(0, text="short", images=None), make_row(1)])
    with pytest.raises(ValueError, match=r"row 1: .*max_prompt_length=20 \(1 of 2 rows.*filter_overlong_prompts"):
        load(path, plain_tokenizer, cache, max_prompt_length=20)


def test_dropping_every_row_is_an_error(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"^all 1 rows are longer than data.max_prompt_length=5"):
        load(write([make_row(0)]), plain_tokenizer, cache, max_prompt_length=5, filter_overlong_prompts=True)


@pytest.mark.parametrize("how", [Truncation.LEFT, Truncation.RIGHT, Truncation.MIDDLE])
def test_truncating_by_any_number_keeps_each_image_whole_or_fails(
    write: Write, tokenizer: Any, cache: Path, how: Truncation
) -> None:
    text = "Words before the plot <image> and after it."
    if how is Truncation.MIDDLE:
        text = "<image> and after it a longer text, so that the middle of the prompt lies beyond the plot."
    prompt = load(write([make_row(0, text=text)]), tokenizer, cache)[0]
    tokens = Tokens.of(tokenizer)
    outcomes = set()
    for limit in range(1, len(prompt.token_ids)):
        try:
            ids = truncate(prompt.token_ids, limit, how, tokens, where="row 0")
        except ValueError as error:
            assert "would cut an image" in str(error)
            outcomes.add("error")
            continue
        outcomes.add("kept")
        assert len(ids) == limit
        block = [i for i in ids.tolist() if i in (tokens.image_pad, tokens.vision_start, tokens.vision_end)]
        assert block == [tokens.vision_start, *[tokens.image_pad] * 6, tokens.vision_end]
    assert outcomes == {"error", "kept"}


def test_truncation_keeps_the_named_side(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    path = write([make_row(0, text="one two three four five six seven eight", images=None)])
    full = load(path, plain_tokenizer, cache)[0].token_ids
    limit = len(full) - 5
    cut = {
        how: load(path, plain_tokenizer, cache, max_prompt_length=limit, truncation=how)[0].token_ids.tolist()
        for how in (Truncation.LEFT, Truncation.RIGHT, Truncation.MIDDLE)
    }
    half = limit // 2
    assert cut[Truncation.LEFT] == full[5:].tolist()
    assert cut[Truncation.RIGHT] == full[:limit].tolist()
    assert cut[Truncation.MIDDLE] == [*full[:half].tolist(), *full[len(full) - (limit - half) :].tolist()]


def test_uids_are_distinct_over_files_of_one_name_and_stable(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    files = [write([make_row(0)], "a/train.parquet"), write([make_row(1)], "b/train.parquet")]
    assert [p.uid for p in load(files, plain_tokenizer, cache)] == ["a/train-0", "b/train-0"]
    assert [p.uid for p in load(files[::-1], plain_tokenizer, cache)] == ["b/train-0", "a/train-0"]
    with pytest.raises(ValueError, match="given twice"):
        load([files[0], files[0]], plain_tokenizer, cache)


def test_the_digest_changes_with_a_row_and_only_then(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    rows = [make_row(0), make_row(1)]
    same = {load(write(rows), plain_tokenizer, cache).digest for _ in range(2)}
    assert len(same) == 1
    changes: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": QUESTION + "!"}]},
        {"images": [{"bytes": png(9), "path": None}]},
        {"reward_model": {"style": "rule", "ground_truth": "other"}},
        {"data_source": "emg_dataset"},
    ]
    others = {load(write([rows[0], rows[1] | change]), plain_tokenizer, cache).digest for change in changes}
    assert len(others) == len(changes) and not others & same


def test_a_second_load_decodes_nothing(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    path = write([make_row(i) for i in range(3)])
    first, second = (load(path, plain_tokenizer, cache).images for _ in range(2))
    assert first is not None and second is not None
    assert (first.decoded, second.decoded) == (3, 0)


def test_max_samples_takes_the_first_rows(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    path = write([make_row(i) for i in range(4)])
    assert [p.row for p in load(path, plain_tokenizer, cache, max_samples=2)] == [0, 1]
    assert len(load(path, plain_tokenizer, cache, max_samples=-1)) == 4


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("hdfs://host/train.parquet", "remote data files are not supported"),
        ("absent.parquet", "no such data file"),
        ("broken.parquet", "not a readable parquet file"),
    ],
)
def test_an_unreadable_file_is_named(
    tmp_path: Path, plain_tokenizer: Any, cache: Path, file: str, message: str
) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    path = file if "://" in file else tmp_path / file
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        load(path, plain_tokenizer, cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "row 1: the prompt must be text or a list"),
        ({"reward_model": {"style": "rule", "ground_truth": None}}, "row 1: column 'reward_model' must hold"),
        ({"data_source": None}, "row 1: column 'data_source' must name"),
        ({"images": [{"bytes": None, "path": None}]}, "row 1: image 0 must be"),
        ({"images": [{"bytes": None, "path": "gone.png"}]}, "row 1: image file .*gone.png cannot be read"),
    ],
)
def test_a_bad_cell_names_its_row(
    write: Write, plain_tokenizer: Any, cache: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(write([make_row(0), make_row(1) | change]), plain_tokenizer, cache)


def test_a_missing_prompt_column_lists_the_columns(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'question' \(data.prompt_key\); it has \['data_source', 'prompt'"):
        load(write([make_row(0)]), plain_tokenizer, cache, columns=Columns(prompt="question"))


def test_a_tokenizer_without_vision_tokens_is_refused(write: Write, cache: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"no token .*<\|image_pad\|>"):
        load(write([make_row(0)]), bare, cache)


ANSWER = "<think>The level is high.</think><class>Desktop</class>"
SFT_COLUMNS = Columns(response="answer")


def load_sft(path: Path, tokenizer: Any, cache: Path, **options: Any) -> Any:
    return load_sft_dataset(path, tokenizer, SPEC, DatasetOptions(cache_dir=cache, columns=SFT_COLUMNS, **options))


def test_sft_and_rl_prompts_have_the_same_ids(write: Write, tokenizer: Any, cache: Path) -> None:
    path = write([make_row(i, answer=ANSWER) for i in range(2)])
    sft, rl = load_sft(path, tokenizer, cache), load_rl_dataset(path, tokenizer, SPEC, DatasetOptions(cache_dir=cache))
    assert [e.prompt.token_ids.tolist() for e in sft] == [p.token_ids.tolist() for p in rl]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sft[0].response_ids.tolist() == [*tokenizer(ANSWER, add_special_tokens=False)["input_ids"], end]


def test_sft_reads_plain_question_and_answer_columns(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    path = write([{"question": "how many?", "answer": "two"}])
    options = DatasetOptions(cache_dir=cache, columns=Columns(prompt="question", response="answer"))
    data = load_sft_dataset(path, plain_tokenizer, SPEC, options)
    assert plain_tokenizer.decode(data[0].response_ids) == "two<|im_end|>" and data.images is None


def test_an_overlong_answer_is_dropped_cut_or_refused_as_asked(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    path = write([make_row(0, answer="ok"), make_row(1, answer=ANSWER)])
    whole = load_sft(path, plain_tokenizer, cache)
    limit = len(whole[1].prompt.token_ids) + len(whole[1].response_ids) - 1
    with pytest.raises(ValueError, match=rf"row 1: prompt and answer have {limit + 1} tokens"):
        load_sft(path, plain_tokenizer, cache, max_total_length=limit)
    dropped = load_sft(path, plain_tokenizer, cache, max_total_length=limit, filter_overlong_prompts=True)
    assert (len(dropped), dropped.dropped) == (1, 1)
    cut = load_sft(path, plain_tokenizer, cache, max_total_length=limit, truncation=Truncation.RIGHT)
    assert cut[1].response_ids.tolist() == whole[1].response_ids[:-1].tolist()


def test_the_prompt_limit_holds_for_supervised_rows_as_for_rl(write: Write, plain_tokenizer: Any, cache: Path) -> None:
    path = write([make_row(0, answer=ANSWER), make_row(1, text="Desktop or Laptop?", images=[], answer=ANSWER)])
    limit = len(load_sft(path, plain_tokenizer, cache)[0].prompt.token_ids) - 1
    for load_rows in (load, load_sft):
        with pytest.raises(ValueError, match=rf"row 0: the prompt has {limit + 1} tokens .*max_prompt_length={limit}"):
            load_rows(path, plain_tokenizer, cache, max_prompt_length=limit)
        kept = load_rows(path, plain_tokenizer, cache, max_prompt_length=limit, filter_overlong_prompts=True)
        assert (len(kept), kept.dropped) == (1, 1), load_rows.__name__
    assert kept[0].prompt.row == 1 and plain_tokenizer.decode(kept[0].response_ids) == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize(
    ("answer", "message"), [("a<|image_pad|>", "row 0: the answer holds vision tokens"), ("", "row 0: column 'answer'")]
)
def test_an_impossible_answer_names_its_row(
    write: Write, plain_tokenizer: Any, cache: Path, answer: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_sft(write([make_row(0, answer=answer)]), plain_tokenizer, cache)
