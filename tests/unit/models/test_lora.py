"""Invariants of `verl.models.lora`, with peft as the judge of names, files and choice of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fixtures import SMALL, Maker, open_policy, patch_source, write_tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from verl.models.lora import (
    LoraSpec,
    adapted_layers,
    adapter_count,
    adapters_off,
    add_adapters,
    is_adapter,
    load_adapter,
    merged,
    read_spec,
    save_adapter,
    target_layers,
)
from verl.models.policy import Policy, make_inputs
from verl.packing.layout import pack

ALL = LoraSpec(rank=3, alpha=6.0, target_modules=("all-linear",))
TEXT = LoraSpec(rank=3, alpha=6.0, target_modules=("all-linear",), exclude_modules=(r".*\.visual\..*",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("lora") / "tiny")


@pytest.fixture
def policy(folder: Path) -> Policy:
    return open_policy(folder)


def log_probs(policy: Policy) -> Tensor:
    groups = [Maker(policy.config, seed=2).group([5, 9], SMALL)]
    patches = patch_source()
    batch = pack(groups, image_token_id=policy.config.image_token_id, merge_size=2)
    inputs = make_inputs(batch, patches(batch.image_keys), patches.dim, policy.banned.device)
    return policy(inputs, temperature=1.0).log_probs


def adapters_of(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in policy.hf.named_parameters() if is_adapter(name)}


def disturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    for tensor in adapters_of(policy).values():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def test_a_new_adapter_changes_nothing_and_a_changed_one_does(policy: Policy) -> None:
    before = log_probs(policy)
    add_adapters(policy.hf, ALL, dtype=torch.float32)
    assert torch.equal(log_probs(policy), before)
    disturb(policy)
    assert not torch.allclose(log_probs(policy), before, atol=1e-2)
    with adapters_off(policy):
        assert torch.equal(log_probs(policy), before)
    assert not torch.allclose(log_probs(policy), before, atol=1e-2), "the adapters stayed off"


def test_adapters_come_on_again_after_an_error(policy: Policy) -> None:
    add_adapters(policy.hf, TEXT, dtype=torch.float32)
    with pytest.raises(KeyError), adapters_off(policy):
        raise KeyError
    assert all(layer.lora_on for layer in adapted_layers(policy.hf).values())


def test_merged_weights_compute_what_the_adapters_do(policy: Policy, folder: Path) -> None:
    add_adapters(policy.hf, ALL, dtype=torch.float32)
    disturb(policy)
    plain = open_policy(folder)
    base = dict(plain.hf.named_parameters())
    before = {name: value.detach().clone() for name, value in base.items()}
    found = merged({name: value.detach() for name, value in base.items()}, adapters_of(policy), ALL.scale)
    assert all(torch.equal(base[name], value) for name, value in before.items()), "the weights themselves were changed"
    with torch.no_grad():
        for name, value in found.items():
            base[name].copy_(value)
    torch.testing.assert_close(log_probs(plain), log_probs(policy), rtol=1e-5, atol=1e-5)


def test_gradients_reach_adapters_alone(policy: Policy) -> None:
    policy.requires_grad_(False)
    add_adapters(policy.hf, ALL, dtype=torch.float32)
    disturb(policy)
    log_probs(policy).sum().backward()
    with_gradient = {name for name, p in policy.hf.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == set(adapters_of(policy))


def test_all_linear_chooses_the_layers_that_peft_chooses(folder: Path) -> None:
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    mine = set(target_layers(plain, ALL))
    count = adapter_count(plain, ALL)
    theirs = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    names = {name.rsplit(".lora_A", 1)[0] for name, _ in theirs.named_parameters() if ".lora_A." in name}
    assert {name.removeprefix("base_model.model.") for name in names} == mine
    assert count == sum(p.numel() for name, p in theirs.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize(
    ("target", "exclude", "ends", "vision"),
    [
        (("q_proj", "v_proj"), (), {"q_proj", "v_proj"}, False),
        ((r".*layers\.0\.mlp\..*",), (), {"gate_proj", "up_proj", "down_proj"}, False),
        (("all-linear",), (r".*\.language_model\..*", "proj"), None, True),
    ],
)
def test_patterns_choose_and_exclude(
    policy: Policy, target: tuple[str, ...], exclude: tuple[str, ...], ends: set[str] | None, vision: bool
) -> None:
    found = target_layers(policy.hf, LoraSpec(rank=2, alpha=1.0, target_modules=target, exclude_modules=exclude))
    assert found and {"visual" in name for name in found} == {vision}
    last = {name.rsplit(".", 1)[-1] for name in found}
    assert last == ends if ends is not None else "proj" not in last


@pytest.mark.parametrize(
    ("target", "exclude", "message"),
    [
        (("q_prj",), (), r"target_modules=q_prj: no linear layer of that name \(did you mean q_proj"),
        (("lm_head",), (), "target_modules=lm_head: no linear layer of that name"),
        (("all-linear",), ("zzz",), "exclude_modules=zzz: no linear layer of that name; their names end in"),
        (("q_proj",), ("q_proj",), r"target_modules=\['q_proj'\] less exclude_modules=\['q_proj'\] leaves no layer"),
    ],
)
def test_a_pattern_without_a_layer_is_refused(
    policy: Policy, target: tuple[str, ...], exclude: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        target_layers(policy.hf, LoraSpec(rank=2, alpha=1.0, target_modules=target, exclude_modules=exclude))


def test_a_shell_pattern_is_refused_with_what_to_write(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"target_modules=\*proj: not a regular expression .* write \.\* for anything"):
        target_layers(policy.hf, LoraSpec(rank=1, alpha=1.0, target_modules=("*proj",)))


def test_peft_loads_what_is_written_and_computes_the_same(policy: Policy, folder: Path, tmp_path: Path) -> None:
    add_adapters(policy.hf, TEXT, dtype=torch.float32)
    disturb(policy)
    save_adapter(tmp_path, adapters_of(policy), TEXT, base=str(folder))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    mine = merged(
        {n: p.detach() for n, p in open_policy(folder).hf.named_parameters()}, adapters_of(policy), TEXT.scale
    )
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(value.detach(), mine[name], rtol=1e-6, atol=1e-6)


def test_what_peft_writes_is_read(policy: Policy, folder: Path, tmp_path: Path) -> None:
    theirs = get_peft_model(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(folder),
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    theirs.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert (spec.rank, spec.alpha, set(spec.target_modules)) == (3, 6, {"q_proj", "down_proj"})
    add_adapters(policy.hf, spec, dtype=torch.float32)
    load_adapter(tmp_path, policy.hf)
    found = adapters_of(policy)
    wanted = {n: p for n, p in theirs.named_parameters() if ".lora_" in n}
    assert len(found) == len(wanted) > 0
    for name, value in found.items():
        layer, part = name.rsplit(".", 1)
        assert torch.equal(value, wanted[f"base_model.model.{layer}.{part}.default.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "only plain LoRA without biases can be read, this is LORA, use_dora"),
        ({"peft_type": "IA3"}, "this is IA3"),
        ({"bias": "all"}, "bias=all"),
    ],
)
def test_another_kind_of_adapter_is_refused(
    policy: Policy, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    add_adapters(policy.hf, TEXT, dtype=torch.float32)
    save_adapter(tmp_path, adapters_of(policy), TEXT, base="x")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_spec(tmp_path)


def test_a_folder_without_an_adapter_and_one_of_other_layers_are_refused(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_adapter_path=.*: no adapter_config\.json and adapter_model"):
        read_spec(tmp_path)
    add_adapters(policy.hf, TEXT, dtype=torch.float32)
    some = {name: value for name, value in adapters_of(policy).items() if ".0." not in name}
    save_adapter(tmp_path, some, TEXT, base="x")
    with pytest.raises(ValueError, match="not the adapters of this model: missing"):
        load_adapter(tmp_path, policy.hf)
