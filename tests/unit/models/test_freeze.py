"""Freezing by name pattern, and the table of what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_fixtures import open_policy, write_tiny

from verl.models.freeze import freeze, parameter_table
from verl.models.lora import LoraSpec, add_adapters
from verl.models.policy import Policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("freeze") / "tiny")


@pytest.fixture
def policy(folder: Path) -> Policy:
    return open_policy(folder)


def trained(policy: Policy) -> set[str]:
    return {name for name, p in policy.hf.named_parameters() if p.requires_grad}


def test_patterns_stop_training_what_they_fit_and_nothing_else(policy: Policy) -> None:
    everything = trained(policy)
    freeze(policy.hf, ["*.language_model.layers.0.*", "*norm*"])
    frozen = everything - trained(policy)
    assert frozen == {n for n in everything if ".language_model.layers.0." in n or "norm" in n}


def test_no_pattern_changes_nothing(policy: Policy) -> None:
    everything = trained(policy)
    freeze(policy.hf, [])
    assert trained(policy) == everything


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("model.language_model.layer.0.mlp.up_proj.weight", "fits no parameter; near: model.language_model.layers.0.mlp"),
     ("*", r"freeze=\['\*'\] leaves nothing to train")],
)  # fmt: skip
def test_a_pattern_that_fits_nothing_or_everything_is_refused(policy: Policy, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(policy.hf, [pattern])


def test_the_table_counts_every_parameter_once_by_part(policy: Policy) -> None:
    policy.requires_grad_(False)
    add_adapters(policy.hf, LoraSpec(rank=2, alpha=1.0, target_modules=("q_proj",)), dtype=torch.float32)
    freeze(policy.hf, ["*.layers.0.*lora*"])
    table = parameter_table(policy.hf)
    rows = {line[:16].strip(): line[16:].split() for line in table.splitlines()[1:]}
    total = sum(p.numel() for p in policy.hf.parameters())
    assert sum(int(row[2].replace(",", "")) for row in rows.values()) == total
    used = sum(p.numel() for p in policy.hf.parameters() if p.requires_grad)
    assert table.splitlines()[0] == f"{used:,} of {total:,} parameters trained"
    assert rows["vision tower"][-1] == rows["text blocks"][-1] == "frozen"
    assert rows["adapters"][-2:] == [f"{used:,}", "trained"]
