"""The exported folder loads with plain transformers and holds the model's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gloo_ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from verl.models.tiny import TinySize, create_tiny_model
from verl.utils.checkpoint.hf_export import export_huggingface
from verl.utils.dataset.images import ImageSpec

SMALL = TinySize(
    hidden=64, layers=1, heads=2, kv_heads=1, mlp=32, vision_hidden=32, vision_layers=2, vision_heads=2, vision_mlp=32
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    create_tiny_model(folder, ["a plot of a laptop"], size=SMALL)
    return folder


def changed(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """The source model with other weights, as after training."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.001 * (number + 1))
    return model


def assert_same_weights(folder: Path, expected: Qwen2_5_VLForConditionalGeneration, dtype: torch.dtype) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded) is Qwen2_5_VLForConditionalGeneration and loaded.dtype == dtype
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(dtype)), name
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight


def export_rank(rank: int, world: int, source: str, folder: str) -> None:
    model = changed(Path(source))
    mesh = init_device_mesh("cpu", (world,))
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    export_huggingface(model, folder, source=source, dtype=torch.float32)


def test_an_fsdp2_model_on_two_ranks_exports_its_full_weights(source: Path, tmp_path: Path) -> None:
    on_ranks(2, export_rank, str(source), str(tmp_path / "huggingface"))
    assert_same_weights(tmp_path / "huggingface", changed(source), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_the_models_in_the_asked_dtype_and_the_model_is_unchanged(
    source: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = changed(source)
    export_huggingface(model, tmp_path, source=source, dtype=dtype)
    assert_same_weights(tmp_path, changed(source), dtype)
    assert model.dtype == torch.float32 and model.config.dtype == torch.float32


def test_every_other_file_is_the_sources_byte_for_byte(source: Path, tmp_path: Path) -> None:
    export_huggingface(changed(source), tmp_path, source=source)
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names - {"config.json", "generation_config.json", "model.safetensors"}:
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes(), name
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert ImageSpec.from_pretrained(tmp_path) == ImageSpec.from_pretrained(source)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


def test_suppressed_tokens_are_stored_and_the_rest_of_the_generation_config_stays(source: Path, tmp_path: Path) -> None:
    export_huggingface(changed(source), tmp_path, source=source, suppress_tokens=[270, 268])
    written = json.loads((tmp_path / "generation_config.json").read_text())
    given = json.loads((source / "generation_config.json").read_text())
    assert written == given | {"suppress_tokens": [268, 270]}


def test_a_source_that_is_no_model_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json, not a local model folder"):
        export_huggingface(changed(source), tmp_path / "out", source=tmp_path)
    assert not (tmp_path / "out").exists()
