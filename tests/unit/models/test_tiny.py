"""Invariants of the tiny model: an ordinary model folder, the same for the same arguments."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from model_fixtures import SIZE, TEXTS
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from verl.models.policy import VISION_TOKENS, banned_ids, check_model_folder, load_policy, parameter_shapes, stop_ids
from verl.models.tiny import SPECIAL_TOKENS, TinySize, create_tiny_model, texts_of_parquet
from verl.utils.dataset.images import ImageSpec, to_patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    create_tiny_model(path, TEXTS, size=SIZE)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_arguments_write_the_same_bytes_and_leave_the_global_seed_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    create_tiny_model(tmp_path / "again", TEXTS, size=SIZE)
    assert torch.equal(torch.rand(1), expected)
    one, other = files(folder), files(tmp_path / "again")
    assert one.keys() == other.keys() and [n for n in one if one[n] != other[n]] == []


def test_another_seed_writes_other_weights(folder: Path, tmp_path: Path) -> None:
    create_tiny_model(tmp_path / "other", TEXTS, size=SIZE, seed=1)
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "other"))
    name = "model.language_model.embed_tokens.weight"
    key = name if name in one else next(k for k in one if k.endswith("embed_tokens.weight"))
    assert one.keys() == other.keys() and not torch.equal(one[key], other[key])


def test_a_model_for_plots_sees_nothing_on_white_and_has_matrices_of_unit_gain(tmp_path: Path) -> None:
    create_tiny_model(tmp_path, TEXTS, size=SIZE, for_plots=True)
    white = np.full((3, 56, 56), 255, np.uint8)
    assert torch.count_nonzero(to_patches(white, ImageSpec.from_pretrained(tmp_path))) == 0
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv3d)]
    gains = [float(w.std() * w[0].numel() ** 0.5) for w in matrices]
    assert gains == pytest.approx([1.0] * len(gains), rel=0.1)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_default_size_has_between_1_and_20_million_parameters(tmp_path: Path) -> None:
    count = create_tiny_model(tmp_path, TEXTS)
    assert 1_000_000 <= count <= 20_000_000, count
    assert count == sum(p.numel() for p in Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).parameters())


def test_plain_transformers_loads_model_and_tokenizer_and_generates(folder: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight, "the head is tied, as in the 3B"
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert model.config.vision_config.fullatt_block_indexes == [1] and model.config.vision_config.depth == 2
    ids = tokenizer(TEXTS[0], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=5, do_sample=True)
    assert not set(out[0, ids.input_ids.shape[1] :].tolist()) & set(model.generation_config.suppress_tokens)


def test_the_processor_file_is_read_as_the_3b_models_numbers(folder: Path) -> None:
    spec = ImageSpec.from_pretrained(folder)
    assert (spec.patch_size, spec.merge_size, spec.temporal_patch_size, spec.patch_dim) == (14, 2, 2, 1176)


def test_text_survives_encoding_and_decoding_and_special_tokens_are_one_id(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (TEXTS[0], "unseen: äöü 漢字 \n\t 3.14", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for token in SPECIAL_TOKENS:
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)], token


def test_the_chat_template_is_qwens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Which class?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhich class?<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_ends_at_the_ids_of_the_generation_config_and_the_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert stop_ids(folder, tokenizer) == tuple(sorted(ends))
    assert stop_ids(folder / "absent", tokenizer) == (tokenizer.eos_token_id,)


def test_vision_ids_ids_beyond_the_tokenizer_and_suppressed_ids_are_banned(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vision = {tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
    size = len(tokenizer)
    assert len(vision) == 5
    assert banned_ids(folder, tokenizer, size) == sorted(vision)
    assert banned_ids(folder, tokenizer, size + 3) == sorted(vision | {size, size + 1, size + 2})
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": [0, 7]}))
    assert banned_ids(tmp_path, tokenizer, size) == sorted(vision | {0, 7})
    assert banned_ids(tmp_path / "absent", tokenizer, size) == sorted(vision)
    assert not set(stop_ids(folder, tokenizer)) & vision, "an answer must be able to end"


@pytest.mark.parametrize("field", ["hidden", "vision_hidden"])
def test_a_width_that_does_not_fit_the_heads_is_an_error_with_both_numbers(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=100.*4 heads"):
        dataclasses.replace(TinySize(), **{field: 100})


def test_texts_of_data_files_are_prompts_and_answers(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}], "response": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sft.parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": rows[0]["prompt"]}]), tmp_path / "rl.parquet")
    assert texts_of_parquet([tmp_path / "sft.parquet", tmp_path / "rl.parquet"]) == ["a", "b", "a"]


def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"model.path={tmp_path}: no config.json there"):
        check_model_folder(tmp_path)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama' is not supported"):
        check_model_folder(tmp_path)


def test_an_override_that_the_model_does_not_have_is_an_error_with_its_key(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"override_config\.rope_thetaa"):
        load_policy(folder, tokenizer, dtype=torch.float32, overrides={"rope_thetaa": 1.0})
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1 are not supported"):
        load_policy(folder, tokenizer, dtype=torch.float32, overrides={"attention_dropout": 0.1})


def test_shapes_read_from_the_config_are_those_of_the_loaded_model_with_a_tied_head_once(folder: Path) -> None:
    policy = load_policy(folder, AutoTokenizer.from_pretrained(folder), dtype=torch.float32)
    found = parameter_shapes(folder)
    assert found == {name: tuple(parameter.shape) for name, parameter in policy.hf.named_parameters()}
    assert "lm_head.weight" not in found
