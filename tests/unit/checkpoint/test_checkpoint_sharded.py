"""Sharded save and load: exact, on any number of ranks, never with holes."""

from __future__ import annotations

from pathlib import Path

import ckpt_ranks as ranks
import pytest
import torch
from gloo_ranks import on_ranks

from verl.utils.checkpoint.sharded import (
    load_optimizer,
    load_sharded,
    model_state,
    optimizer_state,
    save_optimizer,
    save_sharded,
    stored_tensors,
)


@pytest.fixture(scope="module")
def saved_on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, ranks.save_rank, str(folder))
    return folder


def assert_same(loaded: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    for part in ("model", "optim"):
        assert loaded[part].keys() == expected[part].keys()
        different = [k for k, v in expected[part].items() if not torch.equal(v, loaded[part][k])]
        assert not different, f"{part}: {different}"


@pytest.mark.parametrize("world", [1, 3])
def test_saved_on_two_ranks_loads_exactly_on(world: int, saved_on_two: Path) -> None:
    on_ranks(world, ranks.load_rank, str(saved_on_two))
    assert_same(torch.load(saved_on_two / f"loaded_{world}.pt"), torch.load(saved_on_two / "expected.pt"))


def test_saved_on_two_ranks_loads_without_a_process_group_and_trains_on_alike(saved_on_two: Path) -> None:
    expected = torch.load(saved_on_two / "expected.pt")
    model, optimizer = ranks.build(1, seed=5)
    load_sharded(saved_on_two / "model", model_state(model))
    load_optimizer(saved_on_two / "optim", model, optimizer)
    loaded = {"model": model_state(model), "optim": optimizer_state(model, optimizer)}
    assert_same(loaded, expected)
    assert model.head.weight is model.embed.weight

    whole, whole_optimizer = ranks.build(1, seed=0)
    ranks.train(whole, whole_optimizer, range(5))
    ranks.train(model, optimizer, range(3, 5))
    for (name, one), (_, other) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6, msg=name)


def test_saved_alone_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    whole, whole_optimizer = ranks.build(1, seed=0)
    ranks.train(whole, whole_optimizer, range(6))
    first, first_optimizer = ranks.build(1, seed=0)
    ranks.train(first, first_optimizer, range(3))
    save_sharded(tmp_path / "model", model_state(first))
    save_optimizer(tmp_path / "optim", first, first_optimizer)
    second, second_optimizer = ranks.build(1, seed=7)
    load_sharded(tmp_path / "model", model_state(second))
    load_optimizer(tmp_path / "optim", second, second_optimizer)
    ranks.train(second, second_optimizer, range(3, 6))
    assert all(torch.equal(v, model_state(whole)[k]) for k, v in model_state(second).items())


def test_only_safetensors_are_written_and_the_tied_name_once(saved_on_two: Path) -> None:
    for part in ("model", "optim"):
        assert {path.suffix for path in (saved_on_two / part).iterdir()} == {".safetensors"}
    names = stored_tensors(saved_on_two / "model")
    assert "embed.weight" in names and "head.weight" not in names and "scale" in names
    kinds = {name.split("/")[0] for name in stored_tensors(saved_on_two / "optim")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}


def test_parameters_never_updated_keep_no_state(saved_on_two: Path) -> None:
    assert not [name for name in stored_tensors(saved_on_two / "optim") if "unused" in name]


def test_an_optimizer_before_its_first_step_round_trips(tmp_path: Path) -> None:
    model, optimizer = ranks.build(1, seed=0)
    save_optimizer(tmp_path / "optim", model, optimizer)
    ranks.train(model, optimizer, range(1))
    load_optimizer(tmp_path / "optim", model, optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("shard", [0, 1])
def test_a_missing_shard_is_an_error_and_nothing_is_overwritten(tmp_path: Path, saved_on_two: Path, shard: int) -> None:
    for number, path in enumerate(sorted((saved_on_two / "model").iterdir())):
        if number != shard:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model, _ = ranks.build(1, seed=5)
    before = ranks.full(model_state(model))
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_sharded(tmp_path, model_state(model))
    assert all(torch.equal(v, before[k]) for k, v in model_state(model).items())


def test_a_truncated_shard_is_an_error_naming_the_folder(tmp_path: Path) -> None:
    save_sharded(tmp_path / "m", {"a": torch.zeros(100)})
    file = next((tmp_path / "m").iterdir())
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"m: unreadable safetensors file"):
        load_sharded(tmp_path / "m", {"a": torch.zeros(100)})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"a": torch.zeros(4)}, "missing [], unexpected ['b']"),
        ({"a": torch.zeros(4), "b": torch.zeros(2), "c": torch.zeros(1)}, "missing ['c'], unexpected []"),
        ({"a": torch.zeros(5), "b": torch.zeros(2)}, "a is (4,) float32 there but (5,) float32 here"),
        ({"a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.bfloat16)}, "b is (2,) float32 there but (2,) bfloat16"),
    ],
)
def test_other_tensors_are_an_error_naming_them(tmp_path: Path, wanted: dict[str, torch.Tensor], message: str) -> None:
    save_sharded(tmp_path, {"a": torch.ones(4), "b": torch.ones(2)})
    with pytest.raises(ValueError) as error:
        load_sharded(tmp_path, wanted)
    assert message in str(error.value)
    assert not any(tensor.any() for tensor in wanted.values())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": torch.ones(4)})
    with pytest.raises(ValueError, match="save into an empty folder"):
        save_sharded(tmp_path, {"a": torch.ones(4)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_every_dtype_round_trips(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randint(0, 2, (3, 5)).to(dtype)
    save_sharded(tmp_path, {"a": value, "scalar": value[0, 0].clone()})
    target = {"a": torch.zeros_like(value), "scalar": torch.zeros((), dtype=dtype)}
    load_sharded(tmp_path, target)
    assert torch.equal(target["a"], value) and torch.equal(target["scalar"], value[0, 0])
