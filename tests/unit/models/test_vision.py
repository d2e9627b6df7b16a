"""Invariants of the vision plan and the patch embedding: what the library computes itself, without its loops."""

from __future__ import annotations

import pytest
import torch
from model_fixtures import ODD, SMALL, WIDE, WINDOW, Maker, patch_source
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from verl.models import policy as policy_module
from verl.models import vision
from verl.models.policy import make_inputs, patch_embed_as_matmul
from verl.models.vision import QWEN_VISION, VisionShape, vision_plan
from verl.packing.layout import pack

CPU = torch.device("cpu")

BATCHES = [
    [WIDE],
    [SMALL, SMALL],
    [WIDE, SMALL, ODD, WINDOW],
    [(1, 2, 2), (1, 16, 42), (1, 2, 2)],
    [(2, 4, 10), (1, 10, 4)],
]


@pytest.mark.parametrize("grids", BATCHES, ids=str)
def test_the_plan_of_a_batch_equals_what_the_library_computes(grids) -> None:
    plan = vision_plan(grids, QWEN_VISION, CPU)
    thw = torch.tensor(grids)
    order, windows = get_vision_window_index(thw, spatial_merge_size=2, window_size=112, patch_size=14)
    full = get_vision_cu_seqlens(thw)
    expected = {
        "position_ids": get_vision_position_ids(thw, 2),
        "window_index": order,
        "cu_seqlens": full,
        "cu_window_seqlens": windows,
    }
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(plan, name), value, rtol=0, atol=0, check_dtype=name.startswith("cu"), msg=name
        )
    assert (plan.max_seqlen, plan.max_window_seqlen) == (int(full.diff().max()), int(windows.diff().max()))


def test_what_a_sampler_asked_for_first_can_be_trained_with() -> None:
    vision._one_grid.cache_clear()
    with torch.inference_mode():
        vision_plan([WIDE, SMALL], QWEN_VISION, CPU)
    plan = vision_plan([WIDE, SMALL], QWEN_VISION, CPU)
    tensors = {name: value for name, value in plan.keywords.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 4
    assert not [name for name, value in tensors.items() if value.is_inference()]


def test_a_forward_makes_no_plan_and_moves_nothing(shared_policy, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every such copy would wait for all work in the queue. Pictures of sizes that were not seen before."""
    vision._one_grid.cache_clear()
    batch = pack(
        [make.group([3], WIDE, ODD), make.group([2], SMALL)], image_token_id=make.config.image_token_id, merge_size=2
    )
    source = patch_source()
    inputs = make_inputs(batch, source(batch.image_keys), source.dim, CPU)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the forward made something on the host")

    for module, name in ((policy_module, "vision_plan"), (vision, "to_device"), (vision, "_one_grid")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(torch, "from_numpy", fail)
    monkeypatch.setattr(torch, "tensor", fail)
    assert shared_policy(inputs, temperature=1.0).log_probs.isfinite().all()


def test_inputs_for_another_tower_are_an_error_with_both_shapes(shared_policy, make: Maker) -> None:
    batch = pack([make.group([3], WIDE)], image_token_id=make.config.image_token_id, merge_size=2)
    source = patch_source()
    inputs = make_inputs(batch, source(batch.image_keys), source.dim, CPU, VisionShape(window_size=56))
    with pytest.raises(AssertionError, match=r"window_size=56.*window_size=112"):
        shared_policy(inputs, temperature=1.0)


@pytest.mark.parametrize("grids", BATCHES, ids=str)
def test_the_tower_gives_the_features_of_the_plain_library(grids, tiny_folder, shared_policy) -> None:
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_folder, dtype=torch.float32, attn_implementation="eager"
    ).model.visual
    patches = torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=torch.Generator().manual_seed(0))
    plan = vision_plan(grids, QWEN_VISION, CPU)
    thw = torch.tensor(grids)
    with torch.no_grad():
        found = shared_policy.hf.model.visual(patches, grid_thw=thw, **plan.keywords).pooler_output
        expected = plain(patches, grid_thw=thw).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_features_of_an_image_do_not_depend_on_its_neighbours(shared_policy) -> None:
    tower, generator = shared_policy.hf.model.visual, torch.Generator().manual_seed(0)
    grids = [WIDE, SMALL, ODD]
    images = [torch.randn(t * h * w, 1176, generator=generator) for t, h, w in grids]

    def features(images, grids):
        plan = vision_plan(grids, QWEN_VISION, CPU)
        return tower(torch.cat(images), grid_thw=torch.tensor(grids), **plan.keywords).pooler_output

    with torch.no_grad():
        together = features(images, grids)
        apart = torch.cat([features([image], [grid]) for image, grid in zip(images, grids, strict=True)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_the_patch_embedding_as_one_product_equals_the_convolution() -> None:
    class PatchEmbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv3d(3, 32, kernel_size=(2, 14, 14), stride=(2, 14, 14), bias=False)

        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            return self.proj(patches.view(-1, 3, 2, 14, 14)).view(-1, 32)

    torch.manual_seed(0)
    embed, patches = PatchEmbed(), torch.randn(20, 1176)
    expected = embed(patches)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), embed.proj.weight)
    patch_embed_as_matmul(embed)
    found = embed(patches)
    (found_grad,) = torch.autograd.grad(found.square().sum(), embed.proj.weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-5, atol=1e-4)
