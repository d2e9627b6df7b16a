"""Merged shards equal the model they were cut from; anything missing, damaged or foreign ends without an output."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from verl_shards import write_shards

from verl.model_merger import folder as merger_folder
from verl.model_merger.__main__ import main
from verl.utils.checkpoint.hf_export import copy_model_files

ROOT = Path(__file__).resolve().parents[3]
GRIDS = [(1,), (2,), (4,), (2, 2), (2, 1)]


@pytest.fixture(scope="module")
def weights(tiny_folder: Path) -> dict[str, Tensor]:
    """Every tensor of the tiny model, the tied head under both names as verl stores it."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture
def actor(tmp_path: Path, tiny_folder: Path) -> Path:
    """A checkpoint's folder `actor` before the merge: config and tokenizer, no weights."""
    source = tmp_path / "actor" / "huggingface"
    source.mkdir(parents=True)
    copy_model_files(tiny_folder, source)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(tiny_folder / name, source / name)
    return source.parent


def loaded(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    AutoTokenizer.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return dict(model.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    different = [name for name, value in expected.items() if not torch.equal(found[name], value.to(dtype))]
    assert different == []


@pytest.mark.parametrize("old", [False, True], ids=["today's pickle", "torch 2.6's pickle"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_merged_shards_equal_the_source(actor: Path, weights: dict[str, Tensor], grid: Any, old: bool) -> None:
    write_shards(actor, weights, grid=grid, old=old)
    assert main(["merge", "--backend", "fsdp", "--local_dir", str(actor), "--dtype", "float32"]) == 0
    assert_same(loaded(actor / "huggingface", torch.float32), weights, torch.float32)


def test_plain_tensors_of_one_rank_merge_to_bf16_by_default(actor: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, actor / "model_world_size_1_rank_0.pt")
    assert main(["merge", "--local_dir", str(actor), "--target_dir", str(actor / "merged")]) == 0
    assert_same(loaded(actor / "merged", torch.bfloat16), weights, torch.bfloat16)
    assert json.loads((actor / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not list((actor / "huggingface").glob("*.safetensors")), "--target_dir was given"


def test_fewer_rows_than_ranks_leave_empty_pieces(actor: Path, weights: dict[str, Tensor]) -> None:
    """A tensor of 3 rows on 4 ranks."""
    three = dict(weights) | {"model.visual.extra": torch.arange(6.0).view(3, 2)}
    write_shards(actor, three, grid=(4,))
    from verl.model_merger.shards import merge_shards

    assert torch.equal(merge_shards(actor, torch.float32)["model.visual.extra"], three["model.visual.extra"])


def damage(actor: Path, how: str) -> str:
    """Break one of four shards; what the error must say."""
    path = actor / "model_world_size_4_rank_2.pt"
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return "ranks [2] are missing"
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
        return "rank_2.pt: cannot be read"
    if how == "flipped":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        return "rank_2.pt: damaged"
    state = torch.load(path, weights_only=True)
    if how == "without a tensor":
        del state["lm_head.weight"]
        torch.save(state, path)
        return "on one side only: ['lm_head.weight']"
    if how == "of another model":
        torch.save({name: value._local_tensor[:1] for name, value in state.items()}, path)
        return "rank 2 says"
    assert how == "with code"
    torch.save({"x": subprocess.Popen}, path)
    return "rank_2.pt: cannot be read"


@pytest.mark.parametrize(
    "how", ["missing", "truncated", "flipped", "without a tensor", "of another model", "with code"]
)
def test_a_bad_shard_ends_with_an_error_and_no_output(
    actor: Path, weights: dict[str, Tensor], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(actor, weights, grid=(4,))
    before = sorted(path.name for path in (actor / "huggingface").iterdir())
    message = damage(actor, how)
    new = actor / "target"
    for target in (new, actor / "huggingface"):
        assert main(["merge", "--local_dir", str(actor), "--target_dir", str(target)]) == 2
        assert message in capsys.readouterr().err
    assert not new.exists()
    assert sorted(path.name for path in (actor / "huggingface").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, name: w.pop(name), "1 missing weights of Qwen2_5_VLForConditionalGeneration"),
        (lambda w, name: w.update(more=w[name]), "1 unexpected weights of Qwen2_5_VLForConditionalGeneration: more"),
        (lambda w, name: w.update({name: w[name][:-2]}), "1 mismatched weights of"),
    ],
    ids=["less", "more", "smaller"],
)
def test_weights_that_are_not_those_of_the_config_are_refused(
    actor: Path, weights: dict[str, Tensor], change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.bias"))
    wrong = dict(weights)
    change(wrong, name)
    write_shards(actor, wrong, grid=(1,))
    assert main(["merge", "--local_dir", str(actor), "--target_dir", str(actor / "target")]) == 2
    assert message in capsys.readouterr().err
    assert not (actor / "target").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--local_dir", str(tmp_path / "nowhere"), "--target_dir", str(tmp_path / "out")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_replicas_that_differ_are_refused(
    actor: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(actor, weights, grid=(2, 2))
    write_shards(actor / "other", {name: value + 1 for name, value in weights.items()}, grid=(2, 2))
    shutil.copyfile(actor / "other" / "model_world_size_4_rank_3.pt", actor / "model_world_size_4_rank_3.pt")
    assert main(["merge", "--local_dir", str(actor)]) == 2
    assert "ranks that should hold the same values differ" in capsys.readouterr().err


def test_the_script_of_the_original_fails_and_succeeds_by_its_exit_code(
    actor: Path, weights: dict[str, Tensor]
) -> None:
    def script() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "model_merger.py"), "--local_dir", str(actor)]
        return subprocess.run(command, capture_output=True, text=True, cwd=actor)

    write_shards(actor, weights, grid=(2,))
    (actor / "model_world_size_2_rank_1.pt").rename(actor / "aside")
    failed = script()
    assert failed.returncode == 2 and "ranks [1] are missing" in failed.stderr, failed.stderr
    (actor / "aside").rename(actor / "model_world_size_2_rank_1.pt")
    done = script()
    assert done.returncode == 0, done.stderr
    assert_same(loaded(actor / "huggingface", torch.bfloat16), weights, torch.bfloat16)


@pytest.mark.parametrize(("flag", "private"), [([], True), (["--private"], True), (["--public"], False)])
def test_an_upload_is_private_unless_asked(
    actor: Path,
    weights: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    flag: list[str],
    private: bool,
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, **kwargs: Any) -> None:
            calls.append(("create", kwargs))

        def upload_folder(self, **kwargs: Any) -> None:
            calls.append(("upload", kwargs))

    monkeypatch.setattr(merger_folder, "HfApi", Api)
    torch.save(weights, actor / "model_world_size_1_rank_0.pt")
    assert main(["merge", "--local_dir", str(actor), "--hf_upload_path", "me/model", *flag]) == 0
    assert calls[0] == ("create", {"repo_id": "me/model", "private": private, "exist_ok": True})
    assert calls[1][1]["folder_path"] == str(actor / "huggingface")


def test_a_checkpoint_of_this_version_needs_no_merge(
    actor: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(tiny_folder / "model.safetensors", actor / "huggingface" / "model.safetensors")
    assert main(["merge", "--local_dir", str(actor)]) == 0
    assert "nothing to merge" in capsys.readouterr().out
    assert main(["merge", "--local_dir", str(actor), "--target_dir", str(actor / "copy")]) == 0
    assert (actor / "copy" / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
