"""The training benchmark on a CPU with a tiny model: the code that runs on a GPU, sizes apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "train_step.py")])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workload") / "model"


@pytest.fixture
def bench(model: Path, tmp_path: Path) -> Iterator[Any]:
    import torch
    import train_step

    options = ["--model-size", "tiny", "--model", str(model), "--results", str(tmp_path)]
    yield train_step.make_bench(train_step.arguments(options))
    torch.distributed.destroy_process_group()


def test_every_row_runs_and_in_fp32_all_paths_agree(model: Path, tmp_path: Path) -> None:
    import train_step

    train_step.main(["--model-size", "tiny", "--model", str(model), "--results", str(tmp_path)])
    found = {row["row"]: row for row in json.loads((tmp_path / "train_step.json").read_text())}
    seconds = {name: row["value"] for name, row in found.items() if name.endswith("_s")}
    wanted = {"train_padded_ckpt_s", "train_padded_s", "train_packed_s", "train_shared_s", "reference_s", "update_s"}
    assert seconds.keys() == wanted and all(value > 0 for value in seconds.values()), seconds
    distances = {name: row["value"] for name, row in found.items() if name.startswith("parity_")}
    assert len(distances) == 18 and max(distances.values()) < 1e-5, distances


def test_rows_that_the_time_does_not_allow_say_so_and_append_keeps_the_others(model: Path, tmp_path: Path) -> None:
    import rows
    import train_step

    kept = rows.BenchmarkRow(row="other", workload="CTU-tiny", value=1.0, unit="s")
    rows.write("train_step", [kept], folder=tmp_path)
    options = ["--model", str(model), "--results", str(tmp_path), "--append", "--seconds", "0", "--rows", "shared"]
    train_step.main(["--model-size", "tiny", *options])
    train_step.main(["--model-size", "tiny", *options])
    first, second = json.loads((tmp_path / "train_step.json").read_text())  # a row measured again replaces itself
    assert first["row"] == "other" and first["value"] == 1.0
    assert (second["row"], second["value"]) == ("shared", None) and "time limit" in second["mode"]


def test_the_ablation_has_a_row_for_every_switch_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    import train_step

    asked = [
        "base",
        "vision_attention_by_window",
        "patch_convolution",
        "library_norms",
        "head_checkpointed",
        "liger_mlp",
    ]
    options = ["--model", str(model), "--results", str(tmp_path), "--rows", "ablation", "--switches", *asked]
    train_step.main(["--model-size", "tiny", *options])
    found = {row["row"]: row for row in json.loads((tmp_path / "train_step.json").read_text())}
    assert found.keys() == {f"ablation_{name}_s" for name in asked}
    without = [name for name, row in found.items() if row["value"] is None]
    assert without in ([], ["ablation_liger_mlp_s"]), without


SLOW = {"blocks_compiled": pytest.mark.slow}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=SLOW.get(name, ()))
        for name in (
            *("vision_attention_by_window", "patch_convolution", "library_norms", "library_mlp", "library_rotary"),
            *("text_attention_by_mask", "key_gather_by_index", "head_checkpointed", "head_on_all_tokens"),
            *("not_compiled", "blocks_compiled"),
        )
    ],
)
def test_a_switch_changes_how_and_not_what(name: str, bench: Any) -> None:
    import torch
    import train_step
    from ablation import SWITCHES

    micro_batches = train_step.cut(bench.minis[0][:2], 1)

    def run(switch: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        path = train_step.Packed(bench, torch.float32)
        with SWITCHES[switch](path.policy):
            log_probs = torch.cat(path.pass_over(micro_batches))
        return log_probs, train_step.gradients(path)

    (log_probs, gradients), (base, base_gradients) = run(name), run("base")
    torch.testing.assert_close(log_probs, base, atol=1e-5, rtol=0.0)
    largest, mean = train_step.distance(gradients, base_gradients, "cpu")
    assert largest < 1e-4 and mean < 1e-5, (largest, mean)


def test_every_switch_but_those_of_cuda_is_compared() -> None:
    from ablation import SWITCHES

    (marked,) = (mark for mark in test_a_switch_changes_how_and_not_what.pytestmark if mark.name == "parametrize")
    compared = {parameter.values[0] for parameter in marked.args[1]}
    assert SWITCHES.keys() - compared == {"base", "liger_norms", "liger_mlp"}


def test_what_does_not_fit_is_a_reason_and_the_largest_size_that_fits_is_tried_last() -> None:
    import torch
    from measure import Missed, attempt, largest_that_fits

    def run(size: int) -> float:
        if size > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return 1.0 / size

    assert largest_that_fits([1, 2, 4, 8, 16], run) == (4, {1: 1.0, 2: 0.5, 4: 0.25})
    missed = attempt(lambda: run(8))
    assert isinstance(missed, Missed) and missed.reason.startswith("out of memory: CUDA out of memory")
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 / 0)


def test_a_model_folder_is_reused_and_another_model_in_it_is_refused(model: Path) -> None:
    from dataclasses import replace

    from workload import TINY, ctu_3b_model

    ctu_3b_model(model, TINY)
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert (ctu_3b_model(model, TINY) / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another model"):
        ctu_3b_model(model, replace(TINY, model=replace(TINY.model, rope_theta=1e4)))


def test_prompts_have_one_picture_and_the_workloads_lengths(model: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer
    from workload import TINY, ctu_3b_groups, ctu_3b_model, ctu_3b_prompts

    from verl.models.policy import banned_ids

    ctu_3b_model(model, TINY)
    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    banned = set(banned_ids(model, tokenizer, config.text_config.vocab_size))
    assert max(tokenizer.get_vocab().values()) == TINY.model.size.max_vocabulary - 1
    prompts, patches = ctu_3b_prompts(workload=TINY)
    assert len(prompts) == TINY.prompts
    for prompt in prompts:
        ids = prompt.token_ids
        assert len(ids) == TINY.prompt_tokens and (ids == config.image_token_id).sum() == TINY.image_tokens
        assert patches(prompt.image_keys).shape == (TINY.image_tokens * 4, patches.dim)
    for group in ctu_3b_groups(prompts, TINY):
        assert len(group.samples) == TINY.n
        for sample in group.samples:
            assert len(sample.token_ids) == TINY.answer_tokens and not banned & set(sample.token_ids.tolist())
